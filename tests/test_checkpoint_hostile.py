"""Files made to run code, to reach outside themselves or to exhaust the machine: refused, and nothing has happened."""

import copyreg
import io
import os
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch

from ldm.checkpoint import open_checkpoint, read_object
from ldm.errors import CheckpointError, UnsafeCheckpoint

MAGIC = 0x1950A86A20F9469CFC6C
HEAD = [pickle.dumps(MAGIC, 2), pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)]


class Runs:
    """An object whose pickle asks for a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def marker(tmp_path):
    """A file that a successful attack would make; looked for after the test."""
    path = tmp_path / "attacked"
    yield path
    assert not path.exists()


def as_zip(path, pickled: bytes, compression=zipfile.ZIP_STORED, **records: bytes):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in records.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)
    return path


def as_legacy(path, *pickles: bytes):
    path.write_bytes(b"".join([*HEAD, *pickles]))
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """The opcode GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def stored(key="0", kind="FloatStorage", count=b"K\x04", place="cpu", view=b"") -> bytes:
    """A persistent id, by default of a storage of four numbers."""
    return b"(" + text("storage") + name("torch", kind) + text(key) + text(place) + count + view + b"tQ"


def tensor(size: bytes, stride: bytes, offset=b"K\x00", rebuild="_rebuild_tensor_v2", storage=None) -> bytes:
    """A dict with one tensor, whose numbers are given as opcodes."""
    made = name("torch._utils", rebuild) + b"(" + (stored() if storage is None else storage) + offset + size + stride
    return b"\x80\x02}" + text("weight") + made + b"\x89}tRs."


def refused(path, kind=CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    return message


# ------------------------------------------------------------------------------------------------------- running code

@pytest.mark.parametrize("protocol", range(6))
def test_a_call_is_refused_by_name_in_every_form_and_protocol(protocol, tmp_path, marker):
    command = f"touch {marker}"
    evil = {"state_dict": {"weight": torch.ones(2)}, "callbacks": Runs(os.system, command)}
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps(Runs(os.system, command), protocol))
    assert "asks to run posix.system" in refused(path, UnsafeCheckpoint)
    for zipped in (True, False):
        torch.save(evil, path, _use_new_zipfile_serialization=zipped, pickle_protocol=max(protocol, 2))
        assert "asks to run posix.system" in refused(path, UnsafeCheckpoint)


@pytest.mark.parametrize("place", range(5))
def test_a_call_in_any_of_the_pickles_of_the_older_form_is_refused(place, tmp_path, marker):
    parts = [*HEAD, pickle.dumps({}, 2), pickle.dumps([], 2)]
    parts[place] = pickle.dumps(Runs(os.mkdir, str(marker)), 2)
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"".join(parts))
    assert "posix.mkdir" in refused(path, UnsafeCheckpoint)


@pytest.mark.parametrize("function", [
    "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.setattr", "builtins.open", "builtins.__import__",
    "builtins.compile", "builtins.type", "builtins.map", "builtins.apply", "__builtin__.eval", "os.system", "nt.system",
    "subprocess.Popen", "subprocess.check_output", "importlib.import_module", "runpy._run_code", "pty.spawn",
    "webbrowser.open", "shutil.rmtree", "socket.socket", "pickle.loads", "_pickle.loads", "marshal.loads",
    "code.interact", "types.FunctionType", "types.CodeType", "ctypes.CDLL", "operator.attrgetter",
    "operator.methodcaller", "functools.reduce", "itertools.starmap", "timeit.timeit", "pydoc.pipepager", "bdb.Bdb.run",
    "cProfile.run", "copyreg.add_extension", "copyreg.__newobj__", "sys.modules", "sys.setrecursionlimit", "numpy.load",
    "numpy.f2py.compile", "numpy.testing._private.utils.runstring", "torch.load", "torch.hub.load", "torch.jit.load",
    "torch.ops.load_library", "torch.serialization.load", "torch.storage._load_from_bytes", "torch.nn.Module",
    "torch._utils._import_dotted_name", "torch._utils._rebuild_wrapper_subclass", "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor", "torch.package.PackageImporter", "torch._dynamo.eval_frame.run",
    "pandas.read_pickle", "joblib.load", "dill._dill._create_code", "cloudpickle.cloudpickle._make_function",
    "pytorch_lightningx.run", "omegaconf_evil.run", "lightning_evil.run", "mainx.run",
])
@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL", "INST"])
def test_a_name_that_weights_do_not_need_is_refused_before_it_is_used(function, opcode, tmp_path):
    module, _, attribute = function.rpartition(".")
    known = {
        "GLOBAL": b"\x80\x02" + name(module, attribute),
        "STACK_GLOBAL": b"\x80\x04" + text(module) + text(attribute) + b"\x93",
        "INST": b"\x80\x02(" + f"i{module}\n{attribute}\n".encode(),
    }[opcode]
    said = refused(as_zip(tmp_path / "model.ckpt", known + b"."), UnsafeCheckpoint)
    assert f"asks to run {function.replace('__builtin__', 'builtins')}:" in said


@pytest.mark.parametrize(("module", "path_of_names"), [
    ("collections", "OrderedDict.__init__"), ("collections", "abc.sys.modules"), ("torch", "FloatStorage.__class__"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("pytorch_lightning", "os.system"),
    ("omegaconf.base", "os.system"), ("__main__", "os.system"), ("builtins", "dict.fromkeys"),
    ("torch.nn.modules", "sys.modules"),
])
def test_a_name_that_leads_on_from_an_allowed_one_is_refused(module, path_of_names, tmp_path):
    pickled = b"\x80\x04" + text(module) + text(path_of_names) + b"\x93."
    assert path_of_names in refused(as_zip(tmp_path / "model.ckpt", pickled), UnsafeCheckpoint)


@pytest.mark.parametrize("known", [
    b"K\x01K\x02\x93", text("os\n") + text("system") + b"\x93", b"N" + text("a") + b"\x93",
    text("") + text("eval") + b"\x93", b"cos system\nx\n", name("os;", "system"),
])
def test_a_name_that_is_no_name_is_refused(known, tmp_path):
    refused(as_zip(tmp_path / "model.ckpt", b"\x80\x04" + known + b"."))


def test_a_stand_in_only_stores_what_it_is_called_with_and_told(tmp_path, marker):
    """Calls of allowed names, of what they return, their states and their items: all inert."""
    partial = name("functools", "partial") + b"(" + name("__main__", "system") + text(f"touch {marker}") + b"tR"
    state = b"}(" + text("__class__") + text("os") + text("__setstate__") + text("x") + text("__reduce__") + b"Nub"
    pickled = b"\x80\x02}" + text("callbacks") + partial + state + b"s" + text("weight") + stored() + b"s."
    tree = read_object(as_zip(tmp_path / "model.ckpt", pickled, data__0=bytes(16)))
    assert type(tree["callbacks"]).__name__ == "StandIn"
    assert tree["callbacks"].name == "functools.partial"
    assert tree["callbacks"].state["__setstate__"] == "x"
    assert tree["weight"].tolist() == [0] * 4


@pytest.mark.parametrize("called", [b"K\x01", b"N", text("os.system"), b"]", b"}", stored(),
                                    name("argparse", "Namespace") + b")R"])
@pytest.mark.parametrize("opcode", [b"R", b"\x81", b"}\x92"])
def test_only_a_known_name_can_be_called(called, opcode, tmp_path):
    pickled = b"\x80\x04" + called + b"(" + text("x") + b"t" + opcode + b"."
    refused(as_zip(tmp_path / "model.ckpt", pickled, data__0=bytes(16)))


@pytest.mark.parametrize("target", [
    name("torch._utils", "_rebuild_tensor_v2"), name("collections", "OrderedDict"), name("torch", "FloatStorage"),
    name("torch", "float32"), name("__main__", "Callback"), b"]", b"K\x01", text("x"), b")",
])
def test_a_state_cannot_be_set_on_what_existed_before(target, tmp_path):
    """BUILD with a pair as state sets attributes on whatever it is given, if Python's own unpickler carries it out."""
    before = torch._utils._rebuild_tensor_v2.__defaults__
    pickled = b"\x80\x02" + target + b"N}" + text("__defaults__") + b"Ns\x86b."
    refused(as_zip(tmp_path / "model.ckpt", pickled))
    assert torch._utils._rebuild_tensor_v2.__defaults__ is before


def test_the_extension_registry_is_out_of_reach(tmp_path, marker):
    copyreg.add_extension("posix", "mkdir", 0xF0)
    try:
        pickled = b"\x80\x02\x82\xf0(" + text(str(marker)) + b"tR."
        assert "copyreg" in refused(as_zip(tmp_path / "model.ckpt", pickled), UnsafeCheckpoint)
    finally:
        copyreg.remove_extension("posix", "mkdir", 0xF0)


def test_a_torchscript_program_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    as_zip(path, pickle.dumps({}, 2), **{"constants.pkl": pickle.dumps((), 2), "code__run.py": b"import os"})
    assert "TorchScript" in refused(path)


def test_an_old_tar_file_is_refused_before_it_is_unpacked(tmp_path, marker):
    target = tmp_path / "secret"
    target.write_bytes(pickle.dumps(0))
    path = tmp_path / "model.ckpt"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, str(target)
        archive.addfile(link)
        evil = pickle.dumps(Runs(os.mkdir, str(marker)))
        entry = tarfile.TarInfo("pickle")
        entry.size = len(evil)
        archive.addfile(entry, io.BytesIO(evil))
    assert "tar archive" in refused(path)


def test_a_module_with_its_source_cannot_write_a_patch_file(tmp_path, monkeypatch):
    """torch.load compares such sources and writes the difference to a file that the checkpoint names."""
    monkeypatch.chdir(tmp_path)
    identity = b"(" + text("module") + name("__main__", "Network") + text("network.py") + text("import os") + b"tQ"
    before = set(os.listdir(tmp_path)) | {"model.ckpt"}
    refused(as_legacy(tmp_path / "model.ckpt", b"\x80\x02" + identity + b".", pickle.dumps([], 2)))
    assert set(os.listdir(tmp_path)) == before


# ------------------------------------------------------------------------------------------- reaching outside the file

BIG = b"\x8a\x08" + struct.pack("<q", 2**62)
ENORMOUS = b"\x8a\x20" + (1 << 250).to_bytes(32, "little")


@pytest.mark.parametrize(("size", "stride", "offset"), [
    (b"K\x05\x85", b"K\x01\x85", b"K\x00"),  # longer than the storage
    (b"K\x04\x85", b"K\x02\x85", b"K\x00"),  # steps outside
    (b"K\x04\x85", b"K\x01\x85", b"K\x01"),  # begins too late
    (b"K\x01\x85", b"K\x01\x85", BIG),
    (b"K\x01\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"),  # begins before
    (b"K\x04\x85", b"J\xff\xff\xff\xff\x85", b"K\x03"),  # walks backwards
    (b"J\xff\xff\xff\xff\x85", b"K\x01\x85", b"K\x00"),
    (BIG + b"\x85", b"K\x00\x85", b"K\x00"),  # one number, repeated for ever
    (BIG + BIG + b"\x86", b"K\x00K\x00\x86", b"K\x00"),
    (ENORMOUS + b"\x85", ENORMOUS + b"\x85", b"K\x00"),
    (b"K\x00" + ENORMOUS + b"\x86", b"K\x01K\x01\x86", b"K\x00"),
    (b"K\x02K\x02\x86", b"K\x01\x85", b"K\x00"),
    (b"K\x04", b"K\x01\x85", b"K\x00"),
    (b"G?\xf0\x00\x00\x00\x00\x00\x00\x85", b"K\x01\x85", b"K\x00"),  # a size of 1.0
    (b"\x88\x85", b"K\x01\x85", b"K\x00"),  # a size of True
    (stored(), stored(), b"K\x00"),  # tensors in place of the numbers
    (b"N", b"N", b"N"),
])
def test_a_tensor_that_would_leave_its_storage_is_refused(size, stride, offset, tmp_path):
    refused(as_zip(tmp_path / "model.ckpt", tensor(size, stride, offset), data__0=bytes(16)))
    storages = struct.pack("<q", 4) + bytes(16)
    refused(as_legacy(tmp_path / "model.ckpt", tensor(size, stride, offset).replace(b"tQ", b"NtQ"),
                      pickle.dumps(["0"], 2), storages))


def test_the_honest_form_of_these_files_is_read(tmp_path):
    honest = tensor(b"K\x02K\x02\x86", b"K\x02K\x01\x86")
    numbers = torch.arange(4.0)
    for path in (
        as_zip(tmp_path / "zip.ckpt", honest, data__0=numbers.numpy().tobytes()),
        as_legacy(tmp_path / "legacy.ckpt", honest.replace(b"tQ", b"NtQ"), pickle.dumps(["0"], 2),
                  struct.pack("<q", 4) + numbers.numpy().tobytes()),
    ):
        assert torch.equal(open_checkpoint(path).tensors["weight"], numbers.reshape(2, 2))


@pytest.mark.parametrize("storage", [
    stored(key="1"), stored(key="1" * 1000), stored(key="1\n2"),
    stored(key="../data.pkl"), stored(key="../../etc/passwd"), stored(key=""), stored(count=BIG),
    stored(count=b"J\xff\xff\xff\xff"), stored(count=b"K\x05"), stored(kind="DoubleStorage"), stored(count=b"N"),
    stored(view=b"(" + text("view") + b"K\x00K\x01t"), stored(kind="Tensor"), text("storage") + b"Q", b"K\x00Q", b"NQ",
    b"(" + text("storage") + b"tQ", b"(" + text("module") + name("__main__", "Network") + b"NNtQ", b"P0\n",
])
def test_a_storage_that_is_not_in_the_file_is_refused(storage, tmp_path):
    pickled = tensor(b"K\x04\x85", b"K\x01\x85", storage=storage)
    refused(as_zip(tmp_path / "model.ckpt", pickled, data__0=bytes(16)))
    refused(as_legacy(tmp_path / "model.ckpt", pickled, pickle.dumps(["0"], 2), struct.pack("<q", 4) + bytes(16)))


@pytest.mark.parametrize(("keys", "counts"), [
    (["0", "1"], [4]), (["1"], [4]), ([], []), ({"0": 1}, [4]), (["0"], [-4]), (["0"], [2**62]), (["0"], [3]),
    (None, [4]), ([["0"]], [4]), (["0", "0"], [4, -1]),
])
def test_a_list_of_storages_that_does_not_fit_the_older_form_is_refused(keys, counts, tmp_path):
    pickled = tensor(b"K\x04\x85", b"K\x01\x85").replace(b"tQ", b"NtQ")
    storages = b"".join(struct.pack("<q", count) + bytes(16) for count in counts)
    refused(as_legacy(tmp_path / "model.ckpt", pickled, pickle.dumps(keys, 2), storages))


def test_a_record_that_claims_to_be_longer_than_the_file_is_refused(tmp_path):
    path = as_zip(tmp_path / "model.ckpt", tensor(b"K\x04\x85", b"K\x01\x85"), data__0=bytes(16))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"archive/data/0") - 46  # its record in the central directory
    for field in (20, 24):
        content[entry + field:entry + field + 4] = struct.pack("<I", 2**31)
    pickled = content.index(b"K\x04tQ")
    content[pickled:pickled + 2] = b"K\xff"
    path.write_bytes(content)
    assert "cut short" in refused(path)


# ----------------------------------------------------------------------------------------------- exhausting the machine

def test_a_compressed_zip_is_refused_before_it_is_unpacked(tmp_path):
    bomb = b"\x80\x02" + text("0" * 5_000_000) + b"."
    path = as_zip(tmp_path / "model.ckpt", bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    assert "compressed" in refused(path)


def test_tuples_in_tuples_as_a_key_do_not_exhaust_the_stack(tmp_path):
    """At this depth Python's own unpickler ends the process."""
    deep = b")" + b"\x85" * 200_000
    for pickled in (b"}" + deep + b"Ns.", deep + b"."):
        refused(as_zip(tmp_path / "model.ckpt", b"\x80\x04" + pickled))
    path = tmp_path / "model.ckpt"
    for place in range(3):
        path.write_bytes(b"".join(HEAD[:place]) + b"\x80\x02" + deep + b".")
        refused(path)


@pytest.mark.parametrize(
    "container", [name("torch", "Size"), name("builtins", "set"), name("collections", "OrderedDict")])
def test_a_tensor_is_not_unrolled_into_a_container(container, tmp_path):
    pickled = b"\x80\x02" + container + b"(" + stored() + b"tR."
    refused(as_zip(tmp_path / "model.ckpt", pickled, data__0=bytes(16)))


@pytest.mark.parametrize("pickled", [
    b"", b".", b"\x80\x09.", b"\x80\x02", b"0.", b"1.", b"(", b"t.", b"(K\x01d.", b"h\x05.", b"]K\x01s.", b"}K\x01a.",
    b"K\x01K\x02a.", b"b.", b"R.", b"Q.", b"\x85.", b"\x93.", b"2.", b"\x97.", b"\x98.", b"e.", b"u.", b"\x90.",
    b"q\x00.", b"Ix\n.", b"L" + b"9" * 5000 + b"L\n.", b"}]Ns.", b"\x8f(]\x90.", b"X\xff\xff\xff\xffab.",
    b"\x8d" + b"\xff" * 8 + b".", b"C\x05a.", b"\x8b\xff\xff\xff\x7f.", b"\xff.",
])
def test_a_pickle_that_makes_no_sense_is_a_checkpoint_error(pickled, tmp_path):
    refused(as_zip(tmp_path / "model.ckpt", pickled))
    refused(as_legacy(tmp_path / "model.ckpt", pickled))


def test_a_container_that_holds_itself_does_no_harm(tmp_path):
    pickled = b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s."
    path = as_zip(tmp_path / "model.ckpt", pickled)
    refused(path)
