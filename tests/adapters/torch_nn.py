"""torch.nn and torch.nn.functional through the kit: autograd gives every gradient.

    python -m npformer.testing --target adapters.torch_nn:adapter        (from tests/)

What torch.nn does not do is refused with a word why: the kit then skips the case.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
ACTIVATIONS["gelu_tanh"] = lambda x: F.gelu(x, approximate="tanh")


def adapter():
    return target


def target(op, arrays, options):
    if op == "greedy":
        return {"tokens": greedy(tensors_of(arrays), options)}
    if op not in OPERATIONS:
        raise NotImplementedError(f"torch.nn has no {op}")
    tensors = tensors_of(arrays)
    floats = {k: x for k, x in tensors.items() if x.is_floating_point() and k != "dy"}
    for x in floats.values():
        x.requires_grad_()
    outputs = OPERATIONS[op](tensors, options)
    last = next(reversed(outputs.values()))  # y, or the loss
    gradients = torch.autograd.grad(
        last, list(floats.values()), tensors.get("dy"), materialize_grads=True
    )
    found = {name: y.detach().numpy() for name, y in outputs.items()}
    return found | {f"d.{name}": dx.numpy() for name, dx in zip(floats, gradients, strict=True)}


def tensors_of(arrays):
    return {name: torch.tensor(x) for name, x in arrays.items()}


# --- Ops --------------------------------------------------------------------------------------


def y(function):
    return lambda t, o: {"y": function(t, o)}


def with_keys(mask):
    """torch's softmax of a row without any key is NaN."""
    if mask is not None and not mask.any(dim=-1).all():
        raise NotImplementedError("NaN where a query has nothing to attend to")
    return mask


def softmax(t, o):
    mask = with_keys(t.get("mask"))
    x = t["x"] if mask is None else t["x"].masked_fill(~mask, -torch.inf)
    return x.softmax(dim=-1)


def attention(t, o):
    if not t["keep"].all():
        raise NotImplementedError("scaled_dot_product_attention draws its own dropout mask")
    mask = with_keys(t.get("mask"))
    return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], mask)


def causal_attention(t, o):
    T, S = t["q"].shape[-2], t["k"].shape[-2]
    mask = torch.ones(T, S, dtype=torch.bool).tril(o["offset"])
    return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], mask)


def masked_fill(t, o):
    x, mask = torch.broadcast_tensors(t["x"], t["mask"])
    return x.masked_fill(mask, o["value"])


def cross_entropy(t, o):
    loss = F.cross_entropy(
        t["logits"].reshape(-1, t["logits"].shape[-1]),
        t["targets"].reshape(-1),
        ignore_index=-100 if o["ignore_index"] is None else o["ignore_index"],
        label_smoothing=o["label_smoothing"],
        reduction="mean" if o["n_targets"] is None else "sum",
    )
    return loss if o["n_targets"] is None else loss / o["n_targets"]


# --- torch.nn's modules under our names ---------------------------------------------------------


def theirs(t):
    """Our tensors under torch.nn's names; q, k and v are one matrix there."""
    found = {}
    for name, x in t.items():
        name = name.replace("cross_attn", "multihead_attn").replace("feed_forward.", "")
        if "q_proj" in name:
            ours = name.replace("multihead_attn", "cross_attn")
            x = torch.cat([t[ours.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        if not re.search(r"[kv]_proj\.", name):
            found[name] = x
    return found


def run(module, t, *args, **kwargs):
    names = dict(module.named_parameters())
    parameters = {name: x for name, x in theirs(t).items() if name in names}
    assert parameters.keys() == names.keys()
    return functional_call(module, parameters, args, kwargs)


def inverted(mask, t, H):
    """As torch.nn wants it: (B H, T, S), True = may *not* attend."""
    if mask is None:
        return None
    x, memory = (t[k] for k in (("query", "key") if "query" in t else ("x", "x")))
    return expanded(mask, len(x), H, x.shape[1], memory.shape[1])


def expanded(mask, B, H, T, S):
    return ~with_keys(mask.expand(B, H, T, S)).flatten(0, 1)


def multi_head_attention(t, o):
    H, C = o["n_heads"], t["query"].shape[2]
    module = nn.MultiheadAttention(C, H, batch_first=True, dtype=t["dy"].dtype)
    mask = inverted(t.get("mask"), t, H)
    return run(module, t, t["query"], t["key"], t["value"], attn_mask=mask, need_weights=False)[0]


def layer(Layer, t, o):
    n_ff, C = t["feed_forward.linear1.weight"].shape
    return Layer(
        C,
        o["n_heads"],
        n_ff,
        dropout=0.0,
        activation=ACTIVATIONS[o["activation"]],
        layer_norm_eps=o["eps"],
        batch_first=True,
        norm_first=o["norm_first"],
        dtype=t["dy"].dtype,
    )


def encoder_layer(t, o):
    mask = inverted(t.get("mask"), t, o["n_heads"])
    return run(layer(nn.TransformerEncoderLayer, t, o), t, t["x"], src_mask=mask)


def decoder_layer(t, o):
    H, (B, T, _), S = o["n_heads"], t["x"].shape, t["memory"].shape[1]
    memory_mask = t.get("memory_mask")
    if memory_mask is not None:
        memory_mask = expanded(memory_mask, B, H, T, S)
    return run(
        layer(nn.TransformerDecoderLayer, t, o),
        t,
        t["x"],
        t["memory"],
        tgt_mask=inverted(t["mask"], t, H),
        memory_mask=memory_mask,
    )


def feed_forward(t, o):
    h = F.linear(t["x"], t["linear1.weight"], t["linear1.bias"])
    return F.linear(ACTIVATIONS[o["activation"]](h), t["linear2.weight"], t["linear2.bias"])


# --- The whole model ------------------------------------------------------------------------------


def embed(t, side, ids, c):
    table = t.get(f"{side}_embedding.weight", t["tgt_embedding.weight"])
    e = F.embedding(ids, table, padding_idx=c[f"{side}_pad_id"])
    scale = c["d_model"] ** 0.5 if c["scale_embedding"] else 1.0
    if c["positions"] == "learned":
        return e * scale + t[f"{side}_positions.weight"][: ids.shape[1]]
    angle = angles(0, ids.shape[1], c["d_model"], e.dtype)
    table = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, : c["d_model"]]
    return e * scale + table


def angles(start, n, C, dtype):
    position = torch.arange(start, start + n, dtype=dtype)[:, None]
    return position / 10000 ** (torch.arange(0, C, 2, dtype=dtype) / C)


def logits(t, tgt, c):
    """nn.Transformer between embeddings and a head, which it does not have."""
    H, (B, S), T, dtype = (
        c["n_heads"],
        t["src"].shape,
        tgt.shape[1],
        t["tgt_embedding.weight"].dtype,
    )
    kind = dict(dropout=0.0, batch_first=True, norm_first=c["norm_first"], dtype=dtype)
    module = nn.Transformer(
        c["d_model"],
        H,
        c["n_encoder_layers"],
        c["n_decoder_layers"],
        c["d_ff"],
        activation=ACTIVATIONS[c["activation"]],
        layer_norm_eps=c["eps"],
        **kind,
    )
    if not c["final_norm"]:
        module.encoder.norm = module.decoder.norm = None
    src_real, tgt_real = t["src"] != c["src_pad_id"], tgt != c["tgt_pad_id"]
    src_mask = src_real[:, None, None] & t.get("src_mask", torch.tensor(True))
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    tgt_mask = tgt_real[:, None, None] & causal & t.get("tgt_mask", torch.tensor(True))
    y = run(
        module,
        t,
        embed(t, "src", t["src"], c),
        embed(t, "tgt", tgt, c),
        src_mask=expanded(src_mask, B, H, S, S),
        tgt_mask=expanded(tgt_mask, B, H, T, T),
        memory_mask=expanded(src_real[:, None, None], B, H, T, S),
    )
    if not c["tie_head"]:
        return F.linear(y, t["head.weight"], t["head.bias"])
    table = t["tgt_embedding.weight"]
    is_pad = (torch.arange(len(table)) == c["tgt_pad_id"])[:, None]
    return y @ torch.where(is_pad, table.detach(), table).T


def transformer(t, o):
    c = o["config"]
    y = logits(t, t["tgt"], c)
    loss = F.cross_entropy(
        y.mT, t["targets"], ignore_index=c["tgt_pad_id"], label_smoothing=o["label_smoothing"]
    )
    return {"logits": y, "loss": loss}


@torch.no_grad()
def greedy(t, o):
    c, B = o["config"], len(t["src"])
    tokens = torch.full((B, o["max_len"]), c["tgt_pad_id"])
    running = torch.ones(B, dtype=torch.bool)
    for i in range(o["max_len"]):
        sos = torch.full((B, 1), o["sos_id"])
        # A pad that ends a sample is never read by the others; it only must have one key to see.
        last = logits(t, torch.cat([sos, tokens[:, :i]], dim=1), c)[:, -1]
        last[:, [i for i in (c["tgt_pad_id"], o["sos_id"]) if i != o["eos_id"]]] = -torch.inf
        chosen = last.argmax(dim=-1)
        running &= chosen != o["eos_id"]
        tokens[:, i] = torch.where(running, chosen, c["tgt_pad_id"])
    return tokens.numpy()


OPERATIONS = {
    "matmul": y(lambda t, o: t["a"] @ t["b"]),
    "dot": y(lambda t, o: torch.dot(t["a"], t["b"])),
    "mv": y(lambda t, o: torch.mv(t["a"], t["b"])),
    "mm": y(lambda t, o: torch.mm(t["a"], t["b"])),
    "bmm": y(lambda t, o: torch.bmm(t["a"], t["b"])),
    "linear": y(lambda t, o: F.linear(t["x"], t["weight"], t.get("bias"))),
    "embedding": y(lambda t, o: F.embedding(t["ids"], t["weight"], o["padding_idx"])),
    "softmax": y(softmax),
    "log_softmax": y(lambda t, o: t["x"].log_softmax(dim=-1)),
    "masked_fill": y(masked_fill),
    "attention": y(attention),
    "causal_attention": y(causal_attention),
    "layer_norm": y(
        lambda t, o: F.layer_norm(t["x"], t["weight"].shape, t["weight"], t["bias"], o["eps"])
    ),
    "relu": y(lambda t, o: F.relu(t["x"])),
    "gelu": y(lambda t, o: F.gelu(t["x"])),
    "gelu_tanh": y(lambda t, o: F.gelu(t["x"], approximate="tanh")),
    "cross_entropy": y(cross_entropy),
    "multi_head_attention": y(multi_head_attention),
    "feed_forward": y(feed_forward),
    "encoder_layer": y(encoder_layer),
    "decoder_layer": y(decoder_layer),
    "transformer": transformer,
}


# --- The same with other conventions, each by autograd: what the kit should recognise ------------


def other(**operations):
    def factory():
        table = OPERATIONS | {name: y(function) for name, function in operations.items()}

        def asked(op, arrays, options):
            if op not in table:
                raise NotImplementedError(f"torch.nn has no {op}")
            t = tensors_of(arrays)
            floats = {k: x for k, x in t.items() if x.is_floating_point() and k != "dy"}
            for x in floats.values():
                x.requires_grad_()
            value = table[op](t, options)["y"]
            gradients = torch.autograd.grad(value, list(floats.values()), t["dy"])
            named = zip(floats, gradients, strict=True)
            return {"y": value.detach()} | {f"d.{name}": dx for name, dx in named}

        return asked

    return factory


def norm_by_std(correction, eps):
    """The LayerNorm of many tutorials."""

    def layer_norm(t, o):
        x = t["x"]
        std = x.std(dim=-1, keepdim=True, correction=correction)
        return t["weight"] * (x - x.mean(dim=-1, keepdim=True)) / (std + eps) + t["bias"]

    return layer_norm


def unscaled(t, o):
    mask = torch.ones(t["q"].shape[-2], t["k"].shape[-2], dtype=torch.bool).tril(o["offset"])
    return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], mask, scale=1.0)


def is_causal(t, o):
    return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], is_causal=True)


annotated = other(layer_norm=norm_by_std(1, 1e-6))
eps_outside = other(layer_norm=norm_by_std(0, 1e-5))
not_scaled = other(causal_attention=unscaled)
from_the_start = other(causal_attention=is_causal)


def half_sines(t, o):
    _, n, C = t["x"].shape
    angle = angles(o["offset"], n, C, t["x"].dtype)
    return t["x"] + torch.cat([angle.sin(), angle.cos()], dim=1)[:, :C]


two_halves = other(sinusoidal_positions=half_sines)
