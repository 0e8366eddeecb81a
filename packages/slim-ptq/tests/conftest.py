"""Tiny random models of every family that the tests run over, and samples for them.

Nothing is downloaded: each model is built from its configuration class with a fixed seed.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

# Hypothesis without deadlines: how fast a shared machine is says nothing about the code.
settings.register_profile("slim", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slim")

VOCAB = 128
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GQA = {**COMMON, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
MOE = {"num_experts_per_tok": 2, "router_jitter_noise": 0.0}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}

# family -> (class of the configuration, class of the model, what the configuration sets)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GQA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GQA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GQA, "head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GQA, "sliding_window": None}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GQA, "head_dim": 16, "pad_token_id": 0}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GQA, "head_dim": 16, "pad_token_id": 0}),
    "glm": ("GlmConfig", "GlmForCausalLM", {**GQA, "head_dim": 16, "pad_token_id": 0}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**GQA, "pad_token_id": 0}),
    "phi": ("PhiConfig", "PhiForCausalLM", GQA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**GPT2, "bos_token_id": 0, "eos_token_id": 1}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", COMMON),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {**COMMON, "bias": True, "parallel_attn": True, "new_decoder_architecture": False},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 0},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GQA, **MOE, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **GQA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **GQA,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**COMMON, **MLA}),
    "chatglm": ("", "", {}),
}


@pytest.fixture(scope="session")
def families() -> tuple[str, ...]:
    """Names that ``tiny_model`` knows."""
    return tuple(FAMILIES)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Factory ``tiny_model(family, *, dtype=torch.float32, seed=0, **changes)``.

    ``changes`` go into the configuration.  Biases and norm weights are random, so that a mistake in
    handling them shows.
    """
    return build_tiny_model


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of model directories: ``tiny_model`` as ``save_pretrained`` writes it, made once.

    Directories are shared by the tests and must not be changed.  That of ``chatglm`` comes with its
    code, and needs ``trust_remote_code=True``.
    """
    made: dict[tuple[Any, ...], Path] = {}

    def save(family: str, **changes: Any) -> Path:
        key = (family, *sorted(changes.items(), key=str))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family) / "model"
            save_tiny_model(build_tiny_model(family, **changes), made[key])
        return made[key]

    return save


@pytest.fixture(scope="session")
def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of single letters (printable ASCII, below ``VOCAB``); others are token 0."""
    letters = {letter: index for index, letter in enumerate(["<unk>", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture(scope="session")
def spelling_model(
    saved_model: Callable[..., Path],
    letter_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Directory of a tiny Llama with a tokenizer of letters; must not be changed."""
    path = tmp_path_factory.mktemp("spelling") / "model"
    shutil.copytree(saved_model("llama", max_position_embeddings=512), path)
    letter_tokenizer.save_pretrained(path)
    return path


def save_tiny_model(model: PreTrainedModel, directory: Path) -> None:
    """Save a model, with its code if transformers does not know it."""
    if isinstance(model, TinyChatGLM):
        home = "modeling_tiny_chatglm"
        model.config.auto_map = {
            "AutoConfig": f"{home}.TinyChatGLMConfig",
            "AutoModel": f"{home}.TinyChatGLM",
            "AutoModelForCausalLM": f"{home}.TinyChatGLM",
        }
        directory.mkdir(parents=True)
        (directory / f"{home}.py").write_text(_REMOTE_HEAD + _remote_code())
    model.save_pretrained(directory)


_REMOTE_HEAD = """from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

VOCAB = 128


"""


def _remote_code() -> str:
    parts = (
        *(TinyChatGLMConfig, GlmRMSNorm, GlmSelfAttention, GlmMLP, GlmBlock, GlmEmbedding),
        *(GlmTransformer, GlmBase, TinyChatGLM),
    )
    return "\n\n".join(inspect.getsource(part) for part in parts)


@pytest.fixture(scope="session")
def tiny_ids() -> Callable[..., torch.Tensor]:
    """Factory ``tiny_ids(length=16, seed=0, batch=1)`` of random token ids ``[batch, length]``."""

    def make(length: int = 16, seed: int = 0, batch: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, VOCAB, (batch, length), generator=generator)

    return make


@pytest.fixture(scope="session")
def tiny_calib(tiny_ids: Callable[..., torch.Tensor]) -> list[list[torch.Tensor]]:
    """Four calibration samples ``[ids, mask]`` of lengths 12, 15, 18 and 21."""
    samples = [tiny_ids(length, seed=length) for length in (12, 15, 18, 21)]
    return [[ids, torch.ones_like(ids)] for ids in samples]


@pytest.fixture(scope="session")
def capture_block() -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return ``capture_block(model, name, ids)``: what the model calls the module ``name`` with."""

    def capture(model: nn.Module, name: str, ids: torch.Tensor) -> Any:
        caught: list[Any] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args, kwargs))

        handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        handle.remove()
        return caught[0]

    return capture


@pytest.fixture(scope="session")
def plant_outliers() -> Callable[..., None]:
    """Return ``plant_outliers(norm, linears, channels, factor)``.

    Multiplies channels of the norm's output and divides the columns of its readers, which leaves
    the float model as it is (norms with a plain weight, ``nn.Linear`` readers).
    """

    def plant(norm: nn.Module, linears: list[nn.Linear], channels: list[int], by: float) -> None:
        with torch.no_grad():
            norm.weight[channels] *= by
            for linear in linears:
                linear.weight[:, channels] /= by

    return plant


def build_tiny_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Build a random model of ``family`` in evaluation mode."""
    torch.manual_seed(seed)
    if family == "chatglm":
        model: PreTrainedModel = TinyChatGLM(TinyChatGLMConfig(**changes))
    else:
        config_class, model_class, given = FAMILIES[family]
        config = getattr(transformers, config_class)(**{**given, **changes})
        model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn_like(parameter) * 0.1
                parameter.add_(noise) if "norm" in name or "ln_" in name else parameter.copy_(noise)
            else:
                parameter.normal_(0.0, 0.1)
    model.config.architectures = [type(model).__name__]
    model = model.to(dtype).eval()
    setattr(model.config, "dtype" if hasattr(model.config, "dtype") else "torch_dtype", dtype)
    return model


class TinyChatGLMConfig(PretrainedConfig):
    model_type = "tiny_chatglm"

    def __init__(
        self,
        hidden_size: int = 64,
        ffn_hidden_size: int = 96,
        num_layers: int = 2,
        num_attention_heads: int = 4,
        multi_query_group_num: int = 2,
        padded_vocab_size: int = VOCAB,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.num_layers = self.num_hidden_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.multi_query_group_num = multi_query_group_num
        self.padded_vocab_size = self.vocab_size = padded_vocab_size
        super().__init__(**{"tie_word_embeddings": False, "pad_token_id": 0, **kwargs})


class GlmRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return (hidden_states * torch.rsqrt(variance + 1e-5)).to(hidden_states.dtype) * self.weight


class GlmSelfAttention(nn.Module):
    """Fused query_key_value with grouped keys and values, sequence first, as remote code has it."""

    def __init__(self, config: TinyChatGLMConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.size = config.hidden_size // self.heads
        width = config.hidden_size + 2 * self.groups * self.size
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=True)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        length, batch, width = hidden_states.shape
        kv = self.groups * self.size
        query, key, value = self.query_key_value(hidden_states).split([width, kv, kv], dim=-1)
        query = query.view(length, batch, self.heads, self.size)
        key, value = (
            part.view(length, batch, self.groups, 1, self.size)
            .expand(-1, -1, -1, self.heads // self.groups, -1)
            .reshape(length, batch, self.heads, self.size)
            for part in (key, value)
        )
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.dense(out.permute(2, 0, 1, 3).reshape(length, batch, width))


class GlmMLP(nn.Module):
    def __init__(self, config: TinyChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = torch.chunk(self.dense_h_to_4h(hidden_states), 2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class GlmBlock(nn.Module):
    def __init__(self, config: TinyChatGLMConfig) -> None:
        super().__init__()
        self.input_layernorm = GlmRMSNorm(config.hidden_size)
        self.self_attention = GlmSelfAttention(config)
        self.post_attention_layernorm = GlmRMSNorm(config.hidden_size)
        self.mlp = GlmMLP(config)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any) -> tuple[Any, None]:
        attention = self.self_attention(self.input_layernorm(hidden_states), attention_mask)
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), None


class GlmEmbedding(nn.Module):
    def __init__(self, config: TinyChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(input_ids).transpose(0, 1).contiguous()


class GlmTransformer(nn.Module):
    def __init__(self, config: TinyChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GlmBlock(config) for _ in range(config.num_layers))
        self.final_layernorm = GlmRMSNorm(config.hidden_size)


class GlmBase(nn.Module):
    def __init__(self, config: TinyChatGLMConfig) -> None:
        super().__init__()
        self.embedding = GlmEmbedding(config)
        self.encoder = GlmTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)


class TinyChatGLM(PreTrainedModel):
    """A model laid out as the remote code of ChatGLM2: names, fused layers, sequence first."""

    config_class = TinyChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ("GlmBlock",)

    def __init__(self, config: TinyChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = GlmBase(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.embedding.word_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutputWithPast:
        hidden_states = self.transformer.embedding(input_ids)
        for block in self.transformer.encoder.layers:
            hidden_states, _ = block(hidden_states, attention_mask)
        hidden_states = self.transformer.encoder.final_layernorm(hidden_states)
        logits = self.transformer.output_layer(hidden_states).transpose(0, 1).contiguous()
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].reshape(-1, logits.shape[-1])
            loss = nn.functional.cross_entropy(shifted.float(), labels[:, 1:].reshape(-1))
        return CausalLMOutputWithPast(loss=loss, logits=logits)
