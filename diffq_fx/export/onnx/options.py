"""What the options of an export may be, which go together, and the presets by runtime."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from diffq_fx import runtimes
from diffq_fx.export.onnx.layout.profiles import TARGETS

_CHOICES = {
    "layout": ("onnxruntime", "qdq"),
    "activations": ("float", "dynamic", "int8"),
    "target": TARGETS,
    "min_container": (2, 4, 8),
}

RUNTIMES: Mapping[str, Mapping[str, Any]] = {name: each.onnx_options for name, each in runtimes.RUNTIMES.items() if each.onnx_options}
"""What ``export_onnx(runtime=...)`` may be -> the options that it stands for; a larger ``min_container`` suits the runtime too."""
_DEFAULTS = RUNTIMES["onnxruntime"]


def layout_and_container(
    runtime: str | None, layout: str | None, min_container: int | None
) -> tuple[Literal["onnxruntime", "qdq"], Literal[2, 4, 8]]:
    """The values of the options that a runtime decides.

    Raises:
        ValueError: The runtime is unknown, or cannot read what an option that is given asks for.

    Example:
        >>> layout_and_container("openvino", None, None), layout_and_container("openvino", None, 8), layout_and_container(None, "qdq", None)
        (('qdq', 4), ('qdq', 8), ('qdq', 2))
    """
    if runtime is not None and runtime not in tuple(RUNTIMES):  # what cannot be hashed, too
        other = f" Its files are written by {runtimes.RUNTIMES[runtime].writer}." if runtime in tuple(runtimes.RUNTIMES) else ""
        raise ValueError(f"runtime must be one of {tuple(RUNTIMES)} or None, got {runtime!r}.{other}")
    preset = _DEFAULTS if runtime is None else RUNTIMES[runtime]
    given = {name: value for name, value in (("layout", layout), ("min_container", min_container)) if value is not None}
    chosen = {**preset, **given}
    if runtime is not None and (chosen["layout"] != preset["layout"] or chosen["min_container"] < preset["min_container"]):
        asked = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"runtime={runtime!r} stands for layout={preset['layout']!r}, min_container={preset['min_container']} or more, got {asked}: "
            "leave one of the two out."
        )
    return chosen["layout"], chosen["min_container"]


def check_options(
    layout: str, activations: str, target: str, min_container: int, calibration: Iterable[Any] | None, *, cache: bool, sizes_given: bool
) -> None:
    """Check the options that are not told by the model.

    Raises:
        TypeError: The calibration is no iterable.
        ValueError: A value is unknown, or two of them do not go together.
    """
    given = {"layout": layout, "activations": activations, "target": target, "min_container": min_container}
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {value!r}.")
    if layout == "qdq" and activations != "float":
        raise ValueError(f'layout "qdq" leaves activations in float, got activations={activations!r}: use layout "onnxruntime".')
    if layout == "qdq" and target != "portable":
        raise ValueError(f'layout "qdq" has one form for every weight, got target={target!r}: leave it out, or use layout "onnxruntime".')
    if activations == "int8" and calibration is None:
        raise ValueError('activations="int8" needs calibration: typical inputs, from which the ranges of the activations are taken.')
    if activations != "int8" and calibration is not None:
        raise ValueError(f'calibration is of no use with activations={activations!r}: only "int8" takes ranges from it.')
    if cache and (sizes_given or activations == "int8"):
        other = "dynamic_shapes" if sizes_given else 'activations="int8"'
        raise ValueError(f"cache=True makes the inputs of the file, and does not go together with {other}: leave one of the two out.")
    if calibration is not None and not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be an iterable of inputs, got {type(calibration).__name__}.")
