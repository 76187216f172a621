"""The tasks, one file each."""

from benchmarks.frontier.tasks.base import Task
from benchmarks.frontier.tasks.cifar10 import Cifar10
from benchmarks.frontier.tasks.language import Language, WholeText
from benchmarks.frontier.tasks.sentences import Sentences
from benchmarks.frontier.tasks.separator import SeparatorTask
from benchmarks.frontier.tasks.text import Text

TASKS: dict[str, type[Task]] = {task.name: task for task in (Cifar10, Text, SeparatorTask, Sentences, Language, WholeText)}

__all__ = ["TASKS", "Task"]
