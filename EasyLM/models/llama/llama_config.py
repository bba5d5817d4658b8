"""The settings of a LLaMA, their flags, the presets, and functions that read settings from files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from EasyLM.checkpoints import load_metadata
from EasyLM.errors import UserError, choose, prefix_errors
from EasyLM.flags import Flag
from EasyLM.models.attention import IMPLEMENTATIONS
from EasyLM.models.llama.checkpoint_record import record_path
from EasyLM.models.llama.dict_literal import parse_dict
from EasyLM.models.llama.hf_settings import check_head_dim, from_hugging_face
from EasyLM.models.llama.remat_policies import AUTO
from EasyLM.models.llama.rope_scaling import RopeScaling, as_rope_scaling
from EasyLM.models.llama.setting_fields import automatic_remat, rate, remat, setting, size
from EasyLM.storage import check_schema
from EasyLM.vocab import BOS, CODEBOOK_SIZE, EOS, MOST_CODES, PAD, SPECIAL_IDS, VOCAB_SIZE, vocabulary


@dataclasses.dataclass(frozen=True)
class LLaMAConfig:
    """The settings of a model. The constructor validates them.

    Raises:
      UserError: if a field is invalid. The message names the field, its value and the rule or the choices.
    """

    vocab_size: int = size(VOCAB_SIZE, "Number of token ids.", most=2**31 - 1)
    hidden_size: int = size(4096, "Width of the residual stream.", most=2**20)
    intermediate_size: int = size(11008, "Width inside the feed-forward network.", most=2**20)
    num_hidden_layers: int = size(32, "Number of blocks.", most=10_000)
    num_attention_heads: int = size(32, "Number of attention heads; divides hidden_size.")
    num_key_value_heads: int = setting(0, "Number of heads of keys and values; 0: num_attention_heads.", least=0)
    qk_norm: bool = setting(False, "Normalize each head's queries and keys, with learned scales, as in Qwen3.")
    max_sequence_length: int = size(4096, "Longest sequence, in tokens.", most=2**31 - 1)
    rms_norm_eps: float = size(1e-6, "Added to the mean square in RMSNorm.")
    rope_theta: float = size(10000.0, "Base of the rotary embedding's wavelengths.")
    rope_scaling: RopeScaling | None = setting(  # noqa: RUF009
        None,
        "Scaling of the wavelengths, a dict such as {'rope_type': 'llama3', 'factor': 8.0}; see RopeScaling.",
        type=str,
    )
    initializer_range: float = size(0.02, "Standard deviation of the initial weights.")
    tie_word_embeddings: bool = setting(False, "The head is the transposed embedding.")
    codebook_size: int = setting(
        0,
        f"Codes of the tokenizer, which vocab_size and the special ids follow; 0: not recorded, {CODEBOOK_SIZE}.",
        least=0,
        most=MOST_CODES,
    )
    bos_token_id: int = setting(BOS, "Id that begins a sequence; never an image code.")
    eos_token_id: int = setting(EOS, "Id that ends a sequence; never an image code.")
    pad_token_id: int = setting(PAD, "Id that pads a batch; never an image code.")
    resid_pdrop: float = rate("Dropout on each block's additions to the residual stream.")
    embd_pdrop: float = rate("Dropout on the embeddings.")
    attn_pdrop: float = rate("Dropout on the attention weights.")
    z_loss_weight: float = setting(0.0, "Weight of the z-loss, log^2 of the softmax denominator; PaLM: 1e-4.", least=0)
    fcm_min_ratio: float = rate("Forgetful causal mask: smallest share of past keys dropped in training.")
    fcm_max_ratio: float = rate("Forgetful causal mask: largest share; 0 disables it. Key 0 is never dropped.")
    remat_block: str = automatic_remat("a whole block")
    remat_attention: str = remat("a block's attention")
    remat_mlp: str = remat("a block's feed-forward network")
    scan_attention: bool = setting(False, "Blockwise attention: memory is linear in the sequence length.")
    scan_query_chunk_size: int = size(1024, "Queries of one chunk of the blockwise attention.")
    scan_key_chunk_size: int = size(1024, "Keys of one chunk of the blockwise attention.")
    scan_mlp: bool = setting(False, "Compute the feed-forward network in chunks of the sequence.")
    scan_mlp_chunk_size: int = size(1024, "Tokens of one chunk of the feed-forward network.")
    scan_layers: bool = setting(True, "Compile one block and loop over the layers; else compile each block.")
    attention_implementation: str = setting(
        "auto",
        "auto: on a GPU cudnn in bf16 or fp16, on a TPU splash, else blockwise.",
        choices=IMPLEMENTATIONS,
    )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    def __post_init__(self) -> None:
        def require(name: str, valid: bool, rule: str) -> None:
            if not valid:
                raise UserError(f"llama.{name}={getattr(self, name)!r}: must be {rule}")

        with prefix_errors("llama.rope_scaling"):
            object.__setattr__(self, "rope_scaling", as_rope_scaling(self.rope_scaling))
        if self.num_key_value_heads == self.num_attention_heads:  # equal functions have equal settings
            object.__setattr__(self, "num_key_value_heads", 0)
        for name, flag in FLAG_OF_FIELD.items():
            if name == "rope_scaling":
                continue  # checked above
            value, kind = getattr(self, name), flag.value_type
            if kind is float and type(value) is int:  # JAX would take it for an int32, which may be too small
                require(name, abs(value) < 2**63, f"of type {kind.__name__}")
                value = float(value)
                object.__setattr__(self, name, value)
            require(name, type(value) is kind, f"of type {kind.__name__}")
            if flag.choices:
                choose(f"llama.{name}", value, flag.choices)
            require(name, flag.allows(value), flag.range)
        heads, fcm_max = self.num_attention_heads, self.fcm_max_ratio
        require("num_attention_heads", self.hidden_size % heads == 0, f"a divisor of hidden_size={self.hidden_size}")
        require("num_key_value_heads", heads % self.kv_heads == 0, f"a divisor of num_attention_heads={heads}")
        require("hidden_size", self.head_dim % 2 == 0, f"an even multiple of num_attention_heads={heads}")
        require("fcm_min_ratio", self.fcm_min_ratio <= fcm_max, f"at most fcm_max_ratio={fcm_max}")
        codes = self.codebook_size or CODEBOOK_SIZE
        require("vocab_size", self.vocab_size >= self.codebook_size, f"at least codebook_size={self.codebook_size}")
        for name in SPECIAL_IDS:
            require(name, getattr(self, name) >= codes, f"at least {codes}: smaller ids are image codes")


FLAG_OF_FIELD: dict[str, Flag] = {field.name: field.metadata["flag"] for field in dataclasses.fields(LLaMAConfig)}
# Settings that a resumed run may change. They affect only the computation, or are ids; data that contains these ids has
# them in its fingerprint.
RESUMABLE_SETTINGS = frozenset({"codebook_size", "attention_implementation", *SPECIAL_IDS}) | {
    name for name in FLAG_OF_FIELD if name.startswith(("remat_", "scan_"))
}

# Settings for which the parameters were trained. With other values the same arrays compute something else.
TRAINED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "qk_norm",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
)
# Those that a run which starts from the parameters cannot change. Fine-tuning for longer sequences changes the rope.
FIXED_SETTINGS = frozenset(TRAINED_SETTINGS) - {"rms_norm_eps", "rope_theta", "rope_scaling"}

LLAMA_FLAGS = {
    name: dataclasses.replace(
        flag,
        default=None,
        type=flag.value_type,
        help=f"{flag.help} Default: the value of --load_llama_config, or {flag.default!r}.",
    )
    for name, flag in FLAG_OF_FIELD.items()
} | {"use_cache": Flag(True, "Ignored: generation always uses a cache, training never.", ignored=True)}


def _preset(hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int) -> LLaMAConfig:
    return LLaMAConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
    )


PRESETS = {
    "vqlm_debug": _preset(128, 256, 2, 4),
    "vqlm_100m": _preset(640, 1664, 22, 10),
    "vqlm_300m": _preset(1024, 2688, 22, 8),
    "vqlm_600m": _preset(1536, 4096, 22, 16),
    "vqlm_1b": _preset(2048, 5504, 22, 16),
    "vqlm_3b": _preset(3200, 8640, 26, 32),
    "vqlm_7b": _preset(4096, 11008, 32, 32),
    "vqlm_13b": _preset(5120, 13824, 40, 40),
    "vqlm_20b": _preset(6144, 16128, 46, 48),
    "vqlm_30b": _preset(6656, 17920, 60, 52),
}


def build_config(
    load_llama_config: str, llama: Mapping[str, Any], update_llama_config: str, default: LLaMAConfig = LLaMAConfig()
) -> LLaMAConfig:
    """Returns the config that three flags specify.

    Args:
      load_llama_config: see `load_config`. An empty string selects `default`.
      llama: the flags `--llama.*`. Settings that are not None override `load_llama_config`.
      update_llama_config: see `updated`. Its settings override both.
    """
    config = load_config(load_llama_config) if load_llama_config else default
    given = {name: value for name, value in llama.items() if value is not None}
    with prefix_errors("--", separator=""):
        config = _with_settings(config, given)
    return updated(config, update_llama_config)


def load_config(spec: str) -> LLaMAConfig:
    """Returns the config that `spec` names: a preset, `json::PATH` or `pickle::PATH`.

    The JSON file holds the `metadata.json` of a run, a plain dict of settings, or a Hugging Face `config.json`. The
    pickle file holds the metadata of a run of the LVM release.

    Raises:
      UserError: if the preset is unknown, or the file is missing or holds no settings.
    """
    kind, separator, path = spec.partition("::")
    if not separator:
        return PRESETS[choose("--load_llama_config", spec, (*PRESETS, "json::PATH", "pickle::PATH"))]
    choose("--load_llama_config", f"{kind}::", ("json::", "pickle::"))
    try:
        return config_from_dict(load_metadata(path), path)
    except FileNotFoundError:
        raise UserError(f"--load_llama_config={spec}: no such file") from None


def recorded_config(prefix: str, path: str) -> LLaMAConfig | None:
    """Returns the config that a checkpoint records, or None if it has none.

    That is the metadata beside its file, or the `config.json` of a Hugging Face directory.

    Args:
      prefix: the checkpoint is `prefix::path`.
    """
    source = record_path(prefix, path)
    return None if source is None else config_from_dict(load_metadata(source), source)


def check_recorded(given: LLaMAConfig, recorded: LLaMAConfig, flag: str, checkpoint: str) -> None:
    """Checks the config that a flag gives against the one that the checkpoint records.

    Raises:
      UserError: naming the settings that the parameters were not trained with.
    """
    differences = ", ".join(
        f"{name}={getattr(given, name)} (saved: {getattr(recorded, name)})"
        for name in TRAINED_SETTINGS
        if getattr(given, name) != getattr(recorded, name)
    )
    if differences:
        raise UserError(
            f"{flag}: {checkpoint} was trained with other settings: {differences}; leave the flag empty to use "
            "those of the checkpoint"
        )


def config_from_dict(values: Mapping[str, Any], source: str) -> LLaMAConfig:
    """Returns the config in a run's metadata, a Hugging Face config, or a plain dict of settings.

    What the steps of a recorded run recompute follows from its devices. It is not returned: `remat_block` is "auto".

    Args:
      source: the name of the values in error messages.

    Raises:
      UserError: if settings are missing or describe another architecture, or a plain dict has an unknown setting.
    """
    with prefix_errors(source):
        check_schema(values, {"llama_config?": dict})
        is_record = "llama_config" in values
        values = dict(values.get("llama_config", values))
    settings = from_hugging_face(values, source) if "model_type" in values else values
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if name not in settings:
            raise UserError(f"{source}: holds no model settings: {name} is missing")
    config = _replaced(LLaMAConfig(), settings, source)
    check_head_dim(values, config.head_dim, source)
    return dataclasses.replace(config, remat_block=AUTO) if is_record else config


def updated(config: LLaMAConfig, text: str) -> LLaMAConfig:
    """Updates a config from a Python dict literal: `{'hidden_size': 64}` or `dict(hidden_size=64)`.

    Raises:
      UserError: if the text is not such a literal, or names an unknown setting. No code in the text is executed.
    """
    if not text:
        return config
    name = f"--update_llama_config={text}"
    with prefix_errors(name):
        values = parse_dict(text)
    return _replaced(config, values, name)


def _replaced(config: LLaMAConfig, values: Mapping[Any, Any], source: str) -> LLaMAConfig:
    values = {name: value for name, value in values.items() if name not in ("use_cache", "lora")}  # a setting of the
    # release; the adapters' settings
    unknown = [str(name) for name in values if name not in FLAG_OF_FIELD]
    if unknown:
        raise UserError(f"{source}: unknown setting {', '.join(unknown)}; choose from {', '.join(FLAG_OF_FIELD)}")
    with prefix_errors(source):
        return _with_settings(config, values)


def _with_settings(config: LLaMAConfig, values: Mapping[str, Any]) -> LLaMAConfig:
    """Returns the config with other settings. Those that follow from another codebook change too, unless given."""
    size = values.get("codebook_size", config.codebook_size)
    changes = size != config.codebook_size and type(size) is int
    following = dataclasses.asdict(vocabulary(size or CODEBOOK_SIZE)) if changes else {}
    return dataclasses.replace(config, **(following | dict(values)))
