"""The settings of a LLaMA, the ten presets, and what follows from the settings alone: sizes, costs, partition specs."""

import ast
import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import PartitionSpec as P

from EasyLM.checkpoints import load_metadata, sidecar_path
from EasyLM.errors import UserError, choose
from EasyLM.flags import Flag
from EasyLM.vocab import BOS, EOS, PAD, VOCAB_SIZE

ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "blockwise", "cudnn")


def _save_attention(prim, *_, **params) -> bool:
    """Saves the attention's result. cuDNN's is known by its primitive: with a name on its output it would run twice."""
    return "dot_product_attention_fwd" in prim.name or (prim.name == "name" and params["name"] == "attention")


_SAVE_PROJECTIONS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT_POLICIES = {  # what `remat_*` keeps for the backward pass; the rest is computed again
    "": None,
    **{
        name: getattr(jax.checkpoint_policies, name)
        for name in (
            "everything_saveable",
            "nothing_saveable",
            "dots_saveable",
            "checkpoint_dots",
            "dots_with_no_batch_dims_saveable",
            "checkpoint_dots_with_no_batch_dims",
        )
    },
    "attention_saveable": _save_attention,
    "projections_and_attention_saveable": jax.checkpoint_policies.save_from_both_policies(
        _SAVE_PROJECTIONS, _save_attention
    ),
}

# (pattern over a parameter's path, how one layer's tensor is split over the mesh axes).
# Optimizer states hold the same paths below other prefixes, so the same rules place them.
PARTITION_RULES = (
    ("transformer/wte/embedding", P("mp", "fsdp")),
    ("attention/(wq|wk|wv)/kernel", P("fsdp", "mp")),
    ("attention/wo/kernel", P("mp", "fsdp")),
    ("feed_forward/(w1|w3)/kernel", P("fsdp", "mp")),
    ("feed_forward/w2/kernel", P("mp", "fsdp")),
    ("(attention_norm|ffn_norm|ln_f)/kernel", P()),
    ("lm_head/kernel", P("fsdp", "mp")),
)


def _setting(default, help: str, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def _remat(part: str):
    return _setting("", f"What {part} keeps for its backward pass, which computes the rest again.", REMAT_POLICIES)


@dataclasses.dataclass(frozen=True)
class LLaMAConfig:
    """A model's settings. Built anywhere, checked here; `help` of each field is also its flag's.

    Raises:
      UserError: naming the field, its value and the rule or the choices.
    """

    vocab_size: int = _setting(VOCAB_SIZE, "Number of token ids.")
    hidden_size: int = _setting(4096, "Width of the residual stream.")
    intermediate_size: int = _setting(11008, "Width inside the feed-forward network.")
    num_hidden_layers: int = _setting(32, "Number of blocks.")
    num_attention_heads: int = _setting(32, "Number of attention heads; divides hidden_size.")
    max_sequence_length: int = _setting(4096, "The longest sequence, in tokens.")
    rms_norm_eps: float = _setting(1e-6, "Added to the mean square in RMSNorm.")
    rope_theta: float = _setting(10000.0, "Base of the rotary embedding's wavelengths.")
    initializer_range: float = _setting(0.02, "Standard deviation of the initial weights.")
    tie_word_embeddings: bool = _setting(False, "The head is the embedding, transposed.")
    bos_token_id: int = _setting(BOS, "Id that begins a sequence; never an image code.")
    eos_token_id: int = _setting(EOS, "Id that ends a sequence; never an image code.")
    pad_token_id: int = _setting(PAD, "Id that fills up a batch; never an image code.")
    resid_pdrop: float = _setting(0.0, "Dropout on what each block adds to the residual stream.")
    embd_pdrop: float = _setting(0.0, "Dropout on the embeddings.")
    attn_pdrop: float = _setting(0.0, "Dropout on the attention weights.")
    fcm_min_ratio: float = _setting(0.0, "Forgetful causal mask: smallest share of past keys dropped in training.")
    fcm_max_ratio: float = _setting(0.0, "Forgetful causal mask: largest share; 0 turns it off. Key 0 always stays.")
    remat_block: str = _remat("a whole block")
    remat_attention: str = _remat("a block's attention")
    remat_mlp: str = _remat("a block's feed-forward network")
    scan_attention: bool = _setting(False, "Blockwise attention: memory linear in the sequence, chunk by chunk.")
    scan_query_chunk_size: int = _setting(1024, "Queries of one chunk of the blockwise attention.")
    scan_key_chunk_size: int = _setting(1024, "Keys of one chunk of the blockwise attention.")
    scan_mlp: bool = _setting(False, "The feed-forward network takes the sequence chunk by chunk.")
    scan_mlp_chunk_size: int = _setting(1024, "Tokens of one chunk of the feed-forward network.")
    scan_layers: bool = _setting(True, "Compile one block and loop over it; else each block is compiled by itself.")
    attention_implementation: str = _setting(
        "auto", "auto: cudnn on a GPU in bf16 or fp16, blockwise on a CPU, else xla.", ATTENTION_IMPLEMENTATIONS
    )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self):
        def require(name, valid, rule):
            if not valid:
                raise UserError(f"llama.{name}={getattr(self, name)!r}: must be {rule}")

        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            number = field.type is float and type(value) is int
            require(name, type(value) is field.type or number, f"of type {field.type.__name__}")
            if field.metadata["choices"]:
                choose(f"llama.{name}", value, field.metadata["choices"])
            elif name.endswith("_pdrop") or name.startswith("fcm_"):
                require(name, 0 <= value < 1, "at least 0 and below 1")
            elif field.type in (int, float) and not name.endswith("_token_id"):
                require(name, value > 0, "positive")
        heads, fcm_max = self.num_attention_heads, self.fcm_max_ratio
        require("num_attention_heads", self.hidden_size % heads == 0, f"a divisor of hidden_size={self.hidden_size}")
        require("hidden_size", self.head_dim % 2 == 0, f"an even multiple of num_attention_heads={heads}")
        require("fcm_min_ratio", self.fcm_min_ratio <= fcm_max, f"at most fcm_max_ratio={fcm_max}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            require(name, getattr(self, name) >= BOS, f"at least {BOS}: smaller ids are image codes")


FIELDS = {field.name: field for field in dataclasses.fields(LLaMAConfig)}
# What a resumed run may set otherwise: how the model is computed, and ids that training never looks at.
RESUMABLE_SETTINGS = frozenset(
    name
    for name in FIELDS
    if name.startswith(("remat_", "scan_")) or name.endswith("_token_id") or name == "attention_implementation"
)

LLAMA_FLAGS = {
    name: Flag(
        None,
        f"{field.metadata['help']} Not given: as --load_llama_config says, or {field.default!r}.",
        choices=tuple(field.metadata["choices"]) if field.metadata["choices"] else None,
        type=field.type,
    )
    for name, field in FIELDS.items()
}


def preset(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, remat_block=None) -> LLaMAConfig:
    # What is cheap to compute is computed again: faster than writing and reading it, on a CPU by a tenth.
    return LLaMAConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        remat_block=remat_block or "projections_and_attention_saveable",
    )


_LEAN = "nothing_saveable"  # from 1b on, the activations of a useful batch do not fit beside the state
PRESETS = {
    "vqlm_debug": preset(128, 256, 2, 4),
    "vqlm_100m": preset(640, 1664, 22, 10),
    "vqlm_300m": preset(1024, 2688, 22, 8),
    "vqlm_600m": preset(1536, 4096, 22, 16),
    "vqlm_1b": preset(2048, 5504, 22, 16, _LEAN),
    "vqlm_3b": preset(3200, 8640, 26, 32, _LEAN),
    "vqlm_7b": preset(4096, 11008, 32, 32, _LEAN),
    "vqlm_13b": preset(5120, 13824, 40, 40, _LEAN),
    "vqlm_20b": preset(6144, 16128, 46, 48, _LEAN),
    "vqlm_30b": preset(6656, 17920, 60, 52, _LEAN),
}


def build_config(load_llama_config: str, llama: Mapping, update_llama_config: str) -> LLaMAConfig:
    """The model that three flags describe: the preset or file, then each `--llama.*` given, then the update literal."""
    config = load_config(load_llama_config) if load_llama_config else LLaMAConfig()
    given = {name: value for name, value in llama.items() if value is not None}
    return updated(dataclasses.replace(config, **given), update_llama_config)


def load_config(spec: str) -> LLaMAConfig:
    """A config from `--load_llama_config`: a preset's name, `json::PATH` or `pickle::PATH`.

    The JSON file is a run's `metadata.json`, a plain dict of settings, or a Hugging Face `config.json`; the pickle is
    the metadata of a run of the LVM release.

    Raises:
      UserError: for an unknown preset, or a file that is not there or holds no settings.
    """
    kind, separator, path = spec.partition("::")
    if not separator:
        return PRESETS[choose("load_llama_config", spec, (*PRESETS, "json::PATH", "pickle::PATH"))]
    choose("load_llama_config", f"{kind}::", ("json::", "pickle::"))
    try:
        return config_from_dict(load_metadata(path), path)
    except FileNotFoundError:
        raise UserError(f"--load_llama_config={spec}: no such file") from None


def config_beside(path: str) -> LLaMAConfig | None:
    """The config in the metadata beside a checkpoint file; None if there is none."""
    metadata = sidecar_path(path, "metadata")
    return None if metadata is None else config_from_dict(load_metadata(metadata), metadata)


def config_from_dict(values: Mapping, source: str) -> LLaMAConfig:
    """A config from a run's metadata, a Hugging Face config, or settings alone; `source` names it in errors.

    Raises:
      UserError: if settings are missing or of another architecture; for settings alone also if one is unknown.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: holds no model settings")
    values = dict(values.get("llama_config", values))
    if "model_type" in values:  # a Hugging Face config, which has its own names beside many that say nothing here
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # transformers 5 and 4
        if values["model_type"] != "llama" or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(f"{source}: only plain LLaMA is known here, not {values['model_type']!r} with rope {rope}")
        heads = values.get("num_attention_heads")
        if values.get("num_key_value_heads", heads) != heads:
            raise UserError(
                f"{source}: num_key_value_heads={values['num_key_value_heads']}: must be {heads}, all heads"
            )
        renamed = {"max_sequence_length": values.get("max_position_embeddings"), "rope_theta": rope.get("rope_theta")}
        values |= {name: value for name, value in renamed.items() if value is not None}
        values = {name: value for name, value in values.items() if name in FIELDS}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the release names image codes here
            if not isinstance(values.get(name), int) or values[name] < BOS:
                values.pop(name, None)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if name not in values:
            raise UserError(f"{source}: holds no model settings: {name} is missing")
    return _replaced(LLaMAConfig(), values, source)


def updated(config: LLaMAConfig, text: str) -> LLaMAConfig:
    """The config with the settings of a Python dict literal: `{'hidden_size': 64}` or `dict(hidden_size=64)`.

    Raises:
      UserError: if the text is no such literal (nothing is executed), or names an unknown setting.
    """
    if not text:
        return config
    name = f"--update_llama_config={text}"
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Call) and getattr(tree.func, "id", "") == "dict" and not tree.args:
            values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in tree.keywords}
        else:
            values = dict(ast.literal_eval(tree).items())
    except (SyntaxError, ValueError, AttributeError):
        raise UserError(f"{name}: not a Python dict literal, as {{'hidden_size': 64}}") from None
    return _replaced(config, values, name)


def _replaced(config: LLaMAConfig, values: Mapping, source: str) -> LLaMAConfig:
    unknown = [str(name) for name in values if name not in FIELDS]
    if unknown:
        raise UserError(f"{source}: unknown setting {', '.join(unknown)}; choose from {', '.join(FIELDS)}")
    return dataclasses.replace(config, **values)


def num_matmul_parameters(config: LLaMAConfig) -> int:
    """Parameters that multiply every token: all but the norms and the embedding, which is a gather."""
    c = config
    block = 4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * block + c.hidden_size * c.vocab_size


def num_parameters(config: LLaMAConfig) -> int:
    """All trained parameters."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return num_matmul_parameters(config) + embedding + norms


def flops_per_token(config: LLaMAConfig, seq_length: int) -> int:
    """Model FLOPs to train on one token of a sequence: 6 N + 6 L T D.

    N are the parameters that multiply each token: 2 FLOPs forward, 4 backward. Attention scores and their weighted sum
    take 4 T D a layer forward over all T keys (D the hidden size); causal attention needs half, and the backward
    pass twice as much again: 3 * 2 T D. Recomputation (remat) is not counted.
    """
    attention = 6 * config.num_hidden_layers * seq_length * config.hidden_size
    return 6 * num_matmul_parameters(config) + attention
