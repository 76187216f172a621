"""The main job on real data, end to end: train, prepare, train on, convert, export, race against float."""

from diffq_fx.demo.run import DemoResult, run

__all__ = ["DemoResult", "run"]
