import pytest

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import CheckpointError
from slim_mindspore.names import is_hugging_face, to_hugging_face, to_mindformers
from slim_mindspore.tensors import parameters_of


def test_every_name_of_the_example_goes_there_and_back(tiny_dir, shared_model):
    theirs = list(open_checkpoint(tiny_dir).tensors)
    ours = [to_mindformers(name) for name in theirs]
    assert set(ours) == set(parameters_of(shared_model))
    assert [to_hugging_face(name) for name in ours] == theirs
    assert is_hugging_face(theirs)
    assert not is_hugging_face(ours)


def test_what_follows_the_cell_stays():
    name = "model.layers.12.self_attn.k_proj.kv_cache_scale"
    assert to_mindformers(name) == "model.layers.12.attention.wk.kv_cache_scale"
    assert to_hugging_face("model.layers.3.feed_forward.w2") == "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize(
    "name",
    ["transformer.h.0.attn", "self_attn.q_proj.weight", "model.layers.0.lm_head", "lm_heads", ""],
)
def test_other_names_are_errors(name):
    with pytest.raises(CheckpointError, match="is not the name of a tensor of a Llama"):
        to_mindformers(name)
    with pytest.raises(CheckpointError, match="is not the name of a tensor of a Llama"):
        to_hugging_face(name)
