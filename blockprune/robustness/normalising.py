"""Pixels in [0, 1] and the models that expect them normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from blockprune.errors import DataError, MeasurementError
from blockprune.modes import in_mode
from blockprune.robustness.record import Normalisation

__all__ = ["Normalised", "PixelData", "device_of", "dtype_of", "logits_of", "pixels_of"]

# Of [0, 1] beyond which pixels cannot be rounding errors of what was normalised.
_SLACK = 1e-4


@dataclass(frozen=True)
class PixelData:
    """Test images as pixels.

    Attributes:
        images: ``(N, C, H, W)``, floating point in [0, 1].
        labels: ``(N,)``, int64.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        from blockprune.robustness.corruptions import check_pixels

        check_pixels(self.images)
        if self.labels.shape != self.images.shape[:1] or self.labels.is_floating_point():
            raise DataError(
                f"One integer label for each of {len(self.images)} images is needed; got "
                f"{self.labels.dtype} {tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, indices: Tensor) -> PixelData:
        """Return the images at ``indices``."""
        return PixelData(self.images[indices], self.labels[indices])


class Normalised(nn.Module):
    """A model that is given pixels in [0, 1] and normalises them itself.

    So a distance between images is in pixels, whatever the model expects. Images are cast to the
    model's dtype, and logits come out in float32 at least.

    Args:
        model: maps normalised images to logits ``(N, classes)``, or to an output with ``logits``.
        normalisation: what it expects.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from blockprune.robustness import Normalisation, Normalised
        >>> halves = Normalisation(mean=(0.5,), deviation=(0.5,))
        >>> Normalised(nn.Flatten(), halves)(torch.tensor([[[[0.0, 1.0]]]]))
        tensor([[-1.,  1.]])
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: nn.Module, normalisation: Normalisation) -> None:
        super().__init__()
        self.model = model
        device, dtype = device_of(model), dtype_of(model)
        for name in ("mean", "deviation"):
            values = torch.tensor(getattr(normalisation, name), dtype=dtype, device=device)
            self.register_buffer(name, values.reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images ``(N, C, H, W)`` in [0, 1]."""
        channels = images.shape[1]
        if len(self.mean) not in (1, channels):
            raise DataError(
                f"The normalisation is of {len(self.mean)} channels, the images have {channels}."
            )
        outputs = self.model((images.to(self.mean) - self.mean) / self.deviation)
        logits = getattr(outputs, "logits", outputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise MeasurementError(
                "Robustness is measured on logits (N, classes); the model returned "
                f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}."
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter or buffer is; the CPU where it has none."""
    found = next(iter((*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if found is None else found.device


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter or buffer, or float32."""
    tensors = (*model.parameters(), *model.buffers())
    return next((one.dtype for one in tensors if one.is_floating_point()), torch.float32)


def logits_of(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Return the logits of images in [0, 1], in evaluation mode, without gradients.

    Raises:
        MeasurementError: a logit is NaN.
    """
    device = device_of(model)
    with torch.no_grad(), in_mode(False, model):
        logits = torch.cat([model(batch.to(device)) for batch in torch.split(images, batch_size)])
    if bool(logits.isnan().any()):
        raise MeasurementError("The model's logits have NaN, so it decides nothing.")
    return logits


def pixels_of(dataset: Dataset[Any], normalisation: Normalisation) -> PixelData:
    """Return a data set of normalised images as pixels in [0, 1]: ``x * deviation + mean``.

    Args:
        dataset: map-style, of ``(image, label)``, images ``(C, H, W)`` normalised.
        normalisation: what they were normalised with.

    Raises:
        DataError: the images are not in [0, 1] after that (beyond rounding), so they were
            normalised with something else; or there are none.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from blockprune.robustness import Normalisation, pixels_of
        >>> data = TensorDataset(torch.full((2, 1, 8, 8), -1.0), torch.tensor([0, 1]))
        >>> pixels_of(data, Normalisation(mean=(0.5,), deviation=(0.5,))).images.max().item()
        0.0
    """
    size: int = len(dataset)  # type: ignore[arg-type]
    if size < 1:
        raise DataError("The data set is empty, so there is nothing to measure on.")
    items = [dataset[index] for index in range(size)]
    images = torch.stack([image for image, _ in items])
    mean, deviation = (
        torch.tensor(values, dtype=images.dtype).reshape(-1, 1, 1)
        for values in (normalisation.mean, normalisation.deviation)
    )
    if len(mean) not in (1, images.shape[1]):
        raise DataError(
            f"The normalisation is of {len(mean)} channels, the images have {images.shape[1]}."
        )
    pixels = images * deviation + mean
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise DataError(
            f"With mean {normalisation.mean} and deviation {normalisation.deviation} the pixels "
            f"lie in [{low:.4g}, {high:.4g}] instead of [0, 1]; give the numbers that the images "
            "were normalised with."
        )
    return PixelData(pixels.clamp(0, 1), torch.tensor([int(label) for _, label in items]))
