"""The perceptual distance of Zhang et al. 2018 on the features of a VGG16."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.checkpoint import read_checkpoint
from ldm.errors import ModelError

# Widths of the VGG16 convolutions before each of the five depths at which features are compared.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16Features(nn.Module):
    """The convolutions of VGG16 in five slices; each layer keeps its number in the `features` of torchvision."""

    def __init__(self):
        super().__init__()
        number, channels = 0, 3
        for i, widths in enumerate(STAGES):
            layers = nn.Sequential()
            if i:
                layers.add_module(str(number), nn.MaxPool2d(2))
                number += 1
            for width in widths:
                layers.add_module(str(number), nn.Conv2d(channels, width, 3, padding=1))
                layers.add_module(str(number + 1), nn.ReLU())
                number, channels = number + 2, width
            setattr(self, f"slice{i + 1}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for i in range(len(STAGES)):
            x = getattr(self, f"slice{i + 1}")(x)
            features.append(x)
        return features


class ScalingLayer(nn.Module):
    """From pixels in [-1, 1] to the statistics that VGG16 was trained on."""

    def __init__(self):
        super().__init__()
        with torch.device("cpu"):
            self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
            self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class NetLinLayer(nn.Module):
    """The weight of each channel in the distance; there is no dropout in front, since nothing here is trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))


class LPIPS(nn.Module):
    """Distance between pictures (b, 3, h, w) in [-1, 1] as VGG16 sees them: (b, 1, 1, 1).

    The weights come from local files, or with an autoencoder's checkpoint, which carries them; none are downloaded.
    They start at zero, by which `forward` tells that none were loaded (ModelError).
    """

    def __init__(self, files: str | Sequence[str] = ()):
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for i, widths in enumerate(STAGES):
            setattr(self, f"lin{i}", NetLinLayer(widths[-1]))
        self.requires_grad_(False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.files = [files] if isinstance(files, str) else list(files)
        if self.files:
            self.load(self.files)
        self.loaded = False

    def load(self, files: Sequence[str]) -> None:
        """Read the weights from one file or several.

        Each holds VGG16 as torchvision writes it (features.0.weight ...), the channel weights (lin0.model.1.weight ...)
        or a whole checkpoint of an autoencoder. Raises ModelError where together they leave something out.
        """
        numbers = {name: f"net.slice{i + 1}.{name}" for i in range(len(STAGES))
                   for name, _ in getattr(self.net, f"slice{i + 1}").named_parameters()}
        state = {}
        for file in files:
            for key, weight in read_checkpoint(file).items():
                key = key.removeprefix("loss.").removeprefix("perceptual_loss.")
                state[numbers.get(key.removeprefix("features."), key)] = weight
        wanted = dict(self.named_parameters())
        missing = wanted.keys() - state.keys()
        if missing:
            raise ModelError(f"{', '.join(files)} lack {len(missing)} weights of LPIPS, e.g. {min(missing)}")
        self.load_state_dict({key: state[key] for key in wanted}, strict=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not self.loaded:
            if not (self.net.slice5[-2].weight.any() and self.lin4.model[1].weight.any()):
                raise ModelError(
                    "the perceptual loss has no weights: name the files of VGG16 and LPIPS in `perceptual_files`, "
                    "start from the checkpoint of an autoencoder, or set perceptual_weight: 0"
                )
            self.loaded = True
        distance = 0
        features = zip(self.net(self.scaling_layer(input)), self.net(self.scaling_layer(target)))
        for i, (ours, theirs) in enumerate(features):
            channels = getattr(self, f"lin{i}").model
            distance = distance + channels((_unit(ours) - _unit(theirs)).square()).mean(dim=(2, 3), keepdim=True)
        return distance


def _unit(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Each pixel's features scaled to length 1."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + eps)
