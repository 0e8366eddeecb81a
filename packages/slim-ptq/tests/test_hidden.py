"""Hidden states are the same whether they are in memory, on disk, or taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.errors import CheckpointError
from slim_ptq.calibration.hidden import HiddenStates


def batches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 8), (2, 5, 8), (1, 3, 8)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def states_of(
    tensors: list[torch.Tensor],
    folder: Path | None,
    limit: int,
    state: dict[str, Any] | None = None,
) -> HiddenStates:
    states = HiddenStates(folder, limit, state)
    for tensor in tensors:
        states.append(tensor)
    return states


def doubled(states: HiddenStates) -> None:
    for index in range(len(states)):
        states.put(index, states[index] * 2)


def equal(found: HiddenStates, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


LIMITS = pytest.mark.parametrize("limit", [0, 400, 1 << 20])  # on disk from the first, second, ...


@LIMITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_block_reads_is_whole_until_all_is_written(
    tmp_path: Path, dtype: torch.dtype, limit: int
) -> None:
    tensors = batches(dtype)
    states = states_of(tensors, tmp_path, limit)
    assert states.on_disk is (limit < states.nbytes)
    for step in range(3):
        doubled(states)
        assert equal(states, [tensor * 2**step for tensor in tensors])
        states.advance()
        assert equal(states, [tensor * 2 ** (step + 1) for tensor in tensors])
    assert (len(list(tmp_path.iterdir())) == 3) is states.on_disk
    states.remove_files()
    assert not list(tmp_path.iterdir())


@LIMITS
def test_a_state_is_whole_until_the_second_one_after_it(tmp_path: Path, limit: int) -> None:
    tensors = batches()
    states = states_of(tensors, tmp_path, limit)
    first = states.save_state()
    doubled(states)
    states.advance()
    states.save_state()  # on its way to disk while the next block runs
    doubled(states)
    again = states_of(tensors, tmp_path, limit, first)
    again.restore()
    assert equal(again, tensors)


def test_inputs_that_are_not_looked_at_again_are_free(tmp_path: Path) -> None:
    for limit in (0, 1 << 20):
        states = states_of(batches(), tmp_path, limit)
        states.replace(0, states[0] * 2)
        assert torch.equal(states.output(0), batches()[0] * 2)
        if not states.on_disk:
            assert states[0] is states.output(0)


@LIMITS
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_state_is_whole_while_the_next_block_writes(
    tmp_path: Path, limit: int, blocks: int
) -> None:
    tensors = batches()
    states = states_of(tensors, tmp_path, limit)
    for _ in range(blocks):
        doubled(states)
        states.advance()
        state = states.save_state()
    state = states.save_state()
    for index in range(2):  # killed in the middle of the next block
        states.put(index, states[index] * 0)
    again = states_of(tensors, tmp_path, limit, state)
    again.restore()
    assert equal(again, [tensor * 2**blocks for tensor in tensors])
    doubled(again)
    again.advance()
    assert equal(again, [tensor * 2 ** (blocks + 1) for tensor in tensors])


def test_a_short_file_is_found(tmp_path: Path) -> None:
    state = states_of(batches(), tmp_path, 1 << 20).save_state()
    with pytest.raises(CheckpointError, match="does not hold"):
        states_of(batches()[:2], tmp_path, 1 << 20, state).restore()
    (tmp_path / "hidden.1.bin").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"hidden\.1\.bin does not hold"):
        states_of(batches(), tmp_path, 1 << 20, state).restore()


def test_without_a_folder_everything_stays_in_memory() -> None:
    states = states_of(batches(), None, 0)
    assert not states.on_disk
    with pytest.raises(CheckpointError, match="without a folder"):
        states.save_state()
