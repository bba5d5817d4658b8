"""Partition rules: how the parameters of a LLaMA are split over the mesh axes."""

from jax.sharding import PartitionSpec as P

from EasyLM.parallel import SHARD_AXES

# (regular expression for a parameter's path, spec of one layer's array). The paths in optimizer states differ only in
# their prefix, so the same rules apply to optimizer states.
PARTITION_RULES = (
    ("transformer/wte/embedding", P("mp", SHARD_AXES)),
    ("attention/(wq|wk|wv)/kernel", P(SHARD_AXES, "mp")),
    ("attention/wo/kernel", P("mp", SHARD_AXES)),
    ("feed_forward/(w1|w3)/kernel", P(SHARD_AXES, "mp")),
    ("feed_forward/w2/kernel", P("mp", SHARD_AXES)),
    ("(attention_norm|ffn_norm|q_norm|k_norm|ln_f)/kernel", P()),
    ("lm_head/kernel", P(SHARD_AXES, "mp")),
    ("(wq|wk|wv|w1|w3)/adapter/lora_a", P(SHARD_AXES, None)),
    ("(wq|wk|wv|w1|w3)/adapter/lora_b", P(None, "mp")),
    ("(wo|w2)/adapter/lora_a", P("mp", None)),
    ("(wo|w2)/adapter/lora_b", P(None, SHARD_AXES)),
)
