import pickle

import pytest

from slim_core import errors
from slim_core.errors import PlanError, SlimError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]
BUILT_IN = {
    "InvalidTypeError": TypeError,
    "InvalidValueError": ValueError,
    "RecipeError": ValueError,
    "PatternError": ValueError,
    "PlanError": ValueError,
    "CheckpointError": ValueError,
    "FormatError": ValueError,
    "CalibrationError": ValueError,
    "NumericalError": ArithmeticError,
    "StructureError": ValueError,
    "FileSecurityError": ValueError,
    "OutputExistsError": FileExistsError,
    "DeviceError": RuntimeError,
    "ResumeError": RuntimeError,
    "MissingDependencyError": ImportError,
}


def slim_errors():
    return [kind for kind in KINDS if issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", slim_errors())
def test_the_tree(kind):
    assert issubclass(kind, SlimError)
    if kind is not SlimError:
        assert issubclass(kind, BUILT_IN[kind.__name__])
        assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", [kind for kind in slim_errors() if kind is not PlanError])
def test_message_and_hint(kind):
    assert str(kind("what is wrong")) == "what is wrong"
    error = kind("what is wrong", hint="do this")
    assert str(error) == "what is wrong\nHint: do this"
    assert (error.message, error.hint) == ("what is wrong", "do this")


def test_plan_errors_list_every_problem():
    error = PlanError(["a is odd", "b is even"], hint="h")
    assert error.problems == ("a is odd", "b is even")
    assert str(error) == "the plan has 2 problems:\n  - a is odd\n  - b is even\nHint: h"
    assert str(PlanError(["a is odd"])) == "the plan has 1 problem:\n  - a is odd"


@pytest.mark.parametrize("kind", slim_errors())
def test_errors_come_back_from_worker_processes(kind):
    argument = ["one", "two"] if kind is PlanError else "one"
    error = kind(argument, hint="h")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert vars(back) == vars(error)
