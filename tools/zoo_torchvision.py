"""All of torchvision's classification architectures, `weights=None`."""

from __future__ import annotations

from zoo_subject import Build, Subject, image, without_torchvision_operators


def subjects() -> dict[str, Build]:
    """Return a builder for each architecture."""
    without_torchvision_operators()
    from torchvision import models  # type: ignore[import-untyped]

    def builder(name: str) -> Build:
        return lambda: Subject(models.get_model(name, weights=None), (image(_size(name)),))

    return {name: builder(name) for name in models.list_models(module=models)}


def _size(name: str) -> int:
    """Return the smallest convenient image an architecture takes and still uses all of its parts on."""
    if name.startswith(("vit", "maxvit")):
        return 224  # the position embedding fixes it
    if name.startswith(("swin", "inception")):
        return 128  # several windows per image; five reductions of an inception stem
    return 64
