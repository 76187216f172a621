"""The zoo: every model, in one list."""

from zoo import control_flow, hugging_face, sequence, vision
from zoo.entry import Entry

ZOO: list[Entry] = [*vision.ENTRIES, *sequence.ENTRIES, *control_flow.ENTRIES, *hugging_face.ENTRIES]

BY_NAME = {entry.name: entry for entry in ZOO}
