"""Question sets with known answers: to measure accuracy on, and to calibrate with.

Each task knows the layout in which its data is published, the prompt that is usual for it, and how
an answer is graded.  Nothing is downloaded; a path to local files is always needed.
"""

from slim_ptq.tasks.base import Question, Task
from slim_ptq.tasks.boolq import BoolQ
from slim_ptq.tasks.exams import CEval, Mmlu
from slim_ptq.tasks.gsm8k import Gsm8k
from slim_ptq.tasks.scoring import Scorer
from slim_ptq.tasks.truthfulqa import TruthfulQA

__all__ = [
    "BoolQ",
    "CEval",
    "Gsm8k",
    "Mmlu",
    "Question",
    "Scorer",
    "Task",
    "TruthfulQA",
]
