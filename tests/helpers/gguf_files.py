"""GGUF files for tests: read back, and computed as llama.cpp computes them, in float64 with numpy."""

import numpy as np
from gguf import GGUFReader, dequantize

from timemix.config.run import RunConfig
from timemix.runs.folder import Progress
from timemix.runs.save import save_checkpoint

LETTERS = "rwkvag"


def write_run(folder, model, tokenizer, dtype=None):
    """Write a model as a run without a text."""
    progress = Progress(step=0, seconds=0.0, valid_loss=None, valid_step=None)
    weights = {name: x.detach().to(dtype or x.dtype) for name, x in model.state_dict().items()}
    save_checkpoint(folder, {"model": weights}, RunConfig(model=model.config), tokenizer, progress)
    return folder


def read_tensors(path):
    """Return the tensors of a file by name, in float32, and the name of the type of each."""
    found = GGUFReader(path).tensors
    arrays = {x.name: dequantize(x.data, x.tensor_type).reshape(x.shape[::-1]).astype(np.float32) for x in found}
    return arrays, {x.name: x.tensor_type.name for x in found}


def read_settings(path):
    """Return the settings of a file by name."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, weights, name, eps=1e-5, heads=1):
    x = x.reshape(heads, -1)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps)
    return x.reshape(-1) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


class Block:
    """The tensors of a block, and its state."""

    def __init__(self, weights, number, channels, heads):
        start = f"blk.{number}."
        self.all = {name.removeprefix(start): x.astype(np.float64) for name, x in weights.items() if start in name}
        self.heads, self.state = heads, np.zeros((heads, channels // heads, channels // heads))
        self.last = {"attn_norm": np.zeros(channels), "attn_norm_2": np.zeros(channels)}

    def __getitem__(self, name):
        return self.all[f"{name}.weight"]

    def normed(self, x, name):
        """Return the normed input, and its difference to that of the previous token."""
        x = norm(x, self.all, name)
        difference, self.last[name] = self.last[name] - x, x
        return x, difference


def mix_of_7(block, x, first):
    x, difference = block.normed(x, "attn_norm")
    r, w, k, v, a, g = x + difference * block["time_mix_lerp_fused"][:, 0, 0]
    rank = {n: block[f"time_mix_{n}1"] for n in "wavg"}
    r, k = block["time_mix_receptance"] @ r, block["time_mix_key"] @ k
    residual = sigmoid(block["time_mix_v2"] @ (rank["v"] @ v) + block["time_mix_v0"])
    v = block["time_mix_value"] @ v
    v = v if first is None else v + (first - v) * residual
    w = np.exp(-np.exp(-0.5) * sigmoid(block["time_mix_w2"] @ np.tanh(rank["w"] @ w) + block["time_mix_w0"]))
    a = sigmoid(block["time_mix_a2"] @ (rank["a"] @ a) + block["time_mix_a0"])
    g = block["time_mix_g2"] @ sigmoid(rank["g"] @ g)
    q = (k * block["time_mix_k_k"]).reshape(block.heads, -1)
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    k = k + (a - 1) * k * block["time_mix_k_a"]
    bonus = (r * k * block["time_mix_r_k"]).reshape(block.heads, -1).sum(1, keepdims=True)
    by_head = [x.reshape(block.heads, -1) for x in (r, w, k, v, a)]
    y = []
    for h, (r, w, k, u, a) in enumerate(zip(*by_head, strict=True)):
        S = block.state[h]
        block.state[h] = S * w + np.outer(S @ -q[h], q[h] * a) + np.outer(u, k)
        y.append(block.state[h] @ r)
    y = norm(np.concatenate(y), block.all, "time_mix_ln", 64e-5, block.heads)
    y = y + (bonus * v.reshape(block.heads, -1)).reshape(-1)
    return block["time_mix_output"] @ (y * g), v if first is None else first


def feed_of_7(block, x):
    x, difference = block.normed(x, "attn_norm_2")
    k = block["channel_mix_key"] @ (x + difference * block["channel_mix_lerp_k"])
    return block["channel_mix_value"] @ np.maximum(k, 0) ** 2


def mix_of_6(block, x, first):
    x, difference = block.normed(x, "attn_norm")
    inner = np.tanh(block["time_mix_w1"] @ (x + difference * block["time_mix_lerp_x"])).reshape(5, -1)
    shares = np.einsum("mcr,mr->mc", block["time_mix_w2"], inner) + block["time_mix_lerp_fused"][:, 0, 0]
    w, k, v, r, g = x + difference * shares
    decay = block["time_mix_decay_w2"] @ np.tanh(block["time_mix_decay_w1"] @ w) + block["time_mix_decay"]
    g = block["time_mix_gate"] @ g
    named = {"receptance": r, "key": k, "value": v}
    r, k, v = ((block[f"time_mix_{n}"] @ x).reshape(block.heads, -1) for n, x in named.items())
    w = np.exp(-np.exp(decay)).reshape(block.heads, -1)
    y = []
    for h in range(block.heads):
        kv = np.outer(k[h], v[h])
        y.append(r[h] @ (block.state[h] + block["time_mix_first"][h][:, None] * kv))
        block.state[h] = block.state[h] * w[h][:, None] + kv
    y = norm(np.concatenate(y), block.all, "time_mix_ln", 64e-5, block.heads)
    return block["time_mix_output"] @ (y * g * sigmoid(g)), None


def feed_of_6(block, x):
    x, difference = block.normed(x, "attn_norm_2")
    k = block["channel_mix_key"] @ (x + difference * block["channel_mix_lerp_k"])
    r = block["channel_mix_receptance"] @ (x + difference * block["channel_mix_lerp_r"])
    return sigmoid(r) * (block["channel_mix_value"] @ np.maximum(k, 0) ** 2)


PARTS = {"rwkv6": (mix_of_6, feed_of_6), "rwkv7": (mix_of_7, feed_of_7)}


def computed_logits(path, tokens):
    """Compute the logits after each token from a file, with the formulas and the layouts of llama.cpp."""
    weights, settings = read_tensors(path)[0], read_settings(path)
    arch = settings["general.architecture"]
    mix, feed = PARTS[arch]
    channels, size = settings[f"{arch}.embedding_length"], settings[f"{arch}.wkv.head_size"]
    blocks = [Block(weights, n, channels, channels // size) for n in range(settings[f"{arch}.block_count"])]
    found = []
    for token in tokens:
        x, first = norm(weights["token_embd.weight"][token].astype(np.float64), weights, "token_embd_norm"), None
        for block in blocks:
            y, first = mix(block, x, first)
            x = x + y
            x = x + feed(block, x)
        found.append(weights["output.weight"] @ norm(x, weights, "output_norm"))
    return np.stack(found)
