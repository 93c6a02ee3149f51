"""Greedy decoding of 64 tokens: with and without a cache, NumPy and PyTorch, and Marian."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.configs import Size
from benchmarks.harness import (
    BenchmarkError,
    Contender,
    Run,
    measure,
    numpy_threads,
    pinned,
    torch_threads,
)
from npformer import Transformer, greedy

DESCRIPTION = """\
Time greedy decoding of exactly 64 tokens, in turns, with equal threads and from the same weights
and sources: npformer and torchformer with their cache, the latter also in fixed shapes
(torchformer/fast.py); torchformer and torch.nn.Transformer without one, which encode once and run
the whole decoder again for each token, as their users do; and generate() of Hugging Face's
Marian, a random model of the same size with its cache (pip install transformers).

All but Marian, whose positions are laid out differently, must give the same tokens.

  python -m benchmarks.decoding --quick
"""
N_TOKENS = 64
PAD, SOS = 0, 1  # there is no end: all answers have N_TOKENS
NPFORMER, TWIN, TWIN_FAST, TWIN_UNCACHED, TORCH, MARIAN = (
    "npformer",
    "torchformer",
    "torchformer, fast",
    "torchformer, no cache",
    "torch.nn.Transformer, no cache",
    "Hugging Face Marian",
)
BACKENDS = {  # on the command line -> in the tables, the package that it needs
    "npformer": (NPFORMER, "numpy"),
    "torchformer": (TWIN, "torch"),
    "fast": (TWIN_FAST, "torch"),
    "uncached": (TWIN_UNCACHED, "torch"),
    "torch": (TORCH, "torch"),
    "marian": (MARIAN, "transformers"),
}
Decode = Callable[[], list[list[int]]]


class Problem:
    """The same weights and sources for everybody."""

    def __init__(self, size: Size, batch: int):
        self.size = replace(size, batch=batch)
        positions = max(size.length, N_TOKENS + 1)
        self.config = replace(size.model_config(), max_len=positions)
        rng = np.random.default_rng(0)
        self.src = rng.integers(3, size.vocab_size, (batch, size.length))  # (B, S)
        self.model = Transformer(self.config, rng)
        for name, p in self.model.named_parameters():
            if "embedding" not in name:  # biases 0 and norms 1 would hide a wrong one
                p.data += 0.02 * rng.standard_normal(p.data.shape, np.float32)


# --- Contenders -------------------------------------------------------------------------------


def decode_numpy(problem: Problem) -> Decode:
    return lambda: greedy(problem.model, problem.src, max_len=N_TOKENS, sos_id=SOS, eos_id=None)


def decode_twin(problem: Problem) -> Decode:
    import torch

    import torchformer
    from torchformer.convert import to_torch

    twin, src = to_torch(problem.model).eval(), torch.from_numpy(problem.src)
    return lambda: torchformer.greedy(twin, src, max_len=N_TOKENS, sos_id=SOS, eos_id=None)


def decode_twin_fast(problem: Problem) -> Decode:
    import torch

    from torchformer import fast
    from torchformer.convert import to_torch

    twin, src = to_torch(problem.model).eval(), torch.from_numpy(problem.src)
    return lambda: fast.greedy(twin, src, max_len=N_TOKENS, sos_id=SOS, eos_id=None)


def decode_twin_uncached(problem: Problem) -> Decode:
    import torch

    from torchformer.convert import to_torch
    from torchformer.masks import padding_mask

    twin, src = to_torch(problem.model).eval(), torch.from_numpy(problem.src)

    def decode() -> list[list[int]]:
        memory, memory_mask = twin.encode(src), padding_mask(src, PAD)
        return rerun(src, lambda tgt: twin.decode(tgt, memory, memory_mask))

    return torch.no_grad()(decode)


def decode_torch(problem: Problem) -> Decode:
    import torch

    from benchmarks.torch_reference import TorchTransformer, to_reference

    size = replace(problem.size, length=problem.config.max_len)
    reference = TorchTransformer(size).eval()
    state = to_reference(problem.model.state_dict())
    reference.load_state_dict({name: torch.from_numpy(w) for name, w in state.items()})
    src, transformer = torch.from_numpy(problem.src), reference.transformer

    def embed(embedding: Any, ids: Any) -> Any:  # (B, T) -> (B, T, C)
        scale = embedding.embedding_dim**0.5
        return embedding(ids) * scale + reference.positions[: ids.shape[1]]

    def decode() -> list[list[int]]:
        memory = transformer.encoder(embed(reference.src_embedding, src))

        def logits(tgt: Any) -> Any:
            n = tgt.shape[1]
            x = embed(reference.tgt_embedding, tgt)
            mask = reference.causal_mask[:n, :n]
            y = transformer.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)
            return reference.head(y[:, -1:])  # all the others are known already

        return rerun(src, logits)

    return torch.no_grad()(decode)


def rerun(src: Any, logits: Callable[[Any], Any]) -> list[list[int]]:
    """The loop that needs no cache: everything so far goes through the decoder for each token."""
    import torch

    tgt = torch.full((len(src), 1), SOS)
    for _ in range(N_TOKENS):
        last = logits(tgt)[:, -1]  # (B, V)
        last[:, [PAD, SOS]] = -torch.inf
        tgt = torch.cat([tgt, last.argmax(dim=-1, keepdim=True)], dim=1)
    return tgt[:, 1:].tolist()


def decode_marian(problem: Problem) -> Decode:
    import torch
    from transformers import (  # pyright: ignore[reportMissingImports]
        MarianConfig,
        MarianMTModel,
    )

    c = problem.config
    config = MarianConfig(
        vocab_size=c.tgt_vocab_size,
        d_model=c.d_model,
        encoder_layers=c.n_encoder_layers,
        decoder_layers=c.n_decoder_layers,
        encoder_attention_heads=c.n_heads,
        decoder_attention_heads=c.n_heads,
        encoder_ffn_dim=c.d_ff,
        decoder_ffn_dim=c.d_ff,
        activation_function="relu",
        max_position_embeddings=c.max_len,
        pad_token_id=PAD,
        eos_token_id=2,
        decoder_start_token_id=SOS,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = MarianMTModel(config)
    model.eval()
    src = torch.from_numpy(problem.src)
    attended = torch.ones_like(src)

    def decode() -> list[list[int]]:
        ids = model.generate(
            src,
            attention_mask=attended,
            max_new_tokens=N_TOKENS,
            min_new_tokens=N_TOKENS,
            num_beams=1,
            do_sample=False,
            use_cache=True,
        )
        return ids[:, 1:].tolist()

    return torch.no_grad()(decode)


MAKE = {
    "npformer": decode_numpy,
    "torchformer": decode_twin,
    "fast": decode_twin_fast,
    "uncached": decode_twin_uncached,
    "torch": decode_torch,
    "marian": decode_marian,
}


# --- The command ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.Parser("decoding", DESCRIPTION, rounds=7, quick_rounds=3)
    add = parser.add_argument
    add("--config", type=harness.sizes, default=None, help="of S, M, B (default M,B; quick: M)")
    add(
        "--batch",
        type=batches,
        default=None,
        help="sentences at once (default 1,32 at M, 1 at B; quick: 1)",
    )
    add(
        "--backends",
        type=lambda text: harness.one_of(BACKENDS, "backend", text),
        help=f"of {','.join(BACKENDS)} (default: what is installed)",
    )
    parser.main(argv, measure_all, draw)


def batches(text: str) -> list[int]:
    return [harness.positive(n) for n in text.split(",")]


def measure_all(options: argparse.Namespace) -> list[Run]:
    backends = options.backends or [b for b, (_, p) in BACKENDS.items() if harness.is_installed(p)]
    for backend in backends:
        package = BACKENDS[backend][1]
        if not harness.is_installed(package):
            raise BenchmarkError(
                f"backend {backend}: {package} is not installed: pip install {package}"
            )
        harness.require(package, package)  # before the threads are pinned: torch has its own
    runs = []
    for size in options.config or harness.sizes("M" if options.quick else "M,B"):
        usual = [1] if options.quick or size.name == "B" else [1, 32]
        for batch in options.batch or usual:
            runs.append(measure_decoding(Problem(size, batch), backends, options))
    return runs


def measure_decoding(problem: Problem, backends: list[str], options: argparse.Namespace) -> Run:
    with pinned(options.threads):
        contenders, answers = [], {}
        for backend in backends:
            name, package = BACKENDS[backend]
            decode = MAKE[backend](problem)
            threads = numpy_threads if package == "numpy" else torch_threads
            contenders.append(Contender(name, decode, threads))
            answers[name] = decode()
        check_same(answers)
        about = {"kind": "decoding", "config": asdict(problem.size), "tokens": N_TOKENS}
        label = f"{problem.size.name}, batch {problem.size.batch}"
        return measure(contenders, rounds=options.rounds, about=about, label=label)


def check_same(answers: dict[str, list[list[int]]]) -> None:
    """All answers are whole, and the same tokens where the model is the same."""
    for name, answer in answers.items():
        if {len(tokens) for tokens in answer} != {N_TOKENS}:
            raise BenchmarkError(f"{name} did not decode {N_TOKENS} tokens for each sentence")
    ours = {name: answer for name, answer in answers.items() if name != MARIAN}
    for name, answer in ours.items():
        reference = next(iter(ours))
        if answer != ours[reference]:
            raise BenchmarkError(f"{name} and {reference} decode different tokens")


def draw(runs: list[Run]) -> str:
    """One table for each size and batch: medians, and what they are of those that have no cache."""
    tables = []
    for run in runs:
        header = ["", "ms", "spread", "/ torch, no cache", "/ Marian"]
        rows = []
        for m in run.measurements:
            of = [f"{run.ratio(m.name, r):.3f}" if r in run else "" for r in (TORCH, MARIAN)]
            rows.append([m.name, harness.milliseconds(m), f"±{100 * m.spread:.0f} %", *of])
        size, first = run.about["config"], run.measurements[0]
        title = (
            f"{size['name']}, batch {size['batch']}: {run.about['tokens']} tokens for sources of "
            f"{size['length']}, threads {first.threads}, rounds {len(first.samples)}"
        )
        tables.append(f"{title}\n\n{harness.table(header, rows)}")
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
