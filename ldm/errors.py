"""What can go wrong, as one tree. Every message says what was wanted, what came and what would work.

LdmError                    exit code 1
├── RequestError            2   an option, prompt file or combination that cannot be carried out
│   ├── ImageError          2   a picture that cannot be read or used
│   ├── DeviceError         2   a device that this machine does not have
│   └── MissingExtra        2   an optional package that is not installed
├── ModelError              3   the model could not be loaded
│   ├── ConfigError         3   a YAML file that is missing, does not parse or names an unknown class
│   └── CheckpointError     3   a weights file that is missing, damaged or of another family
│       └── UnsafeCheckpoint  3   a weights file that asks to run code
├── OutputError             1   a picture that could not be written
├── NumericalError          1   latents or pixels that are not finite
└── OutOfMemory             4   the device cannot hold what was asked for
"""


class LdmError(Exception):
    """Anything that this project reports in one line; `exit_code` is what a script exits with."""

    exit_code = 1


class RequestError(LdmError, ValueError):
    exit_code = 2


class ImageError(RequestError):
    pass


class DeviceError(RequestError):
    pass


class MissingExtra(RequestError, ImportError):
    pass


class ModelError(LdmError):
    exit_code = 3


class ConfigError(ModelError):
    pass


class CheckpointError(ModelError):
    pass


class UnsafeCheckpoint(CheckpointError):
    pass


class OutputError(LdmError):
    pass


class NumericalError(LdmError):
    pass


class OutOfMemory(LdmError):
    exit_code = 4
