"""Run by the interpreter that has llama-cpp-python: greedy tokens, perplexity and tokenization of one GGUF file.

Reads a JSON request on stdin, writes a JSON answer on stdout.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from llama_cpp import Llama

request = json.load(sys.stdin)
model = Llama(request["path"], n_ctx=request["context"], logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)
model.eval(request["prompt"])
tokens: list[int] = []
for _ in range(request["count"]):
    tokens.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    model.eval(tokens[-1:])
loss, predicted = 0.0, 0
for window in request["windows"]:
    model.reset()
    model.eval(window)
    logits = np.asarray(model.scores[: len(window) - 1], dtype=np.float64)
    highest = logits.max(axis=1, keepdims=True)
    total = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
    loss += float((total - logits[np.arange(len(window) - 1), window[1:]]).sum())
    predicted += len(window) - 1
encoded = [model.tokenize(text.encode(), add_bos=True, special=False) for text in request["texts"]]
json.dump({"tokens": tokens, "perplexity": float(np.exp(loss / predicted)), "encoded": encoded}, sys.stdout)
