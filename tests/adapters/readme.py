import numpy as np


def my_softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def my_layer_norm(x, weight, bias):
    mean, std = x.mean(axis=-1, keepdims=True), x.std(axis=-1, keepdims=True)
    return weight * (x - mean) / (std + 1e-6) + bias


def adapter():
    def target(op, arrays, options):
        if op == "softmax" and "mask" not in arrays:
            y, dy = my_softmax(arrays["x"]), arrays["dy"]
            return {"y": y, "d.x": y * (dy - (dy * y).sum(axis=-1, keepdims=True))}
        if op == "layer_norm":
            return {"y": my_layer_norm(arrays["x"], arrays["weight"], arrays["bias"])}
        raise NotImplementedError(f"no {op} with these arrays")

    return target
