# SPDX-License-Identifier: Apache-2.0
"""Generates text with a language model: one prompt, a file of prompts, or a conversation on a terminal.

    python infer.py --prompt="The capital of France is"
    python infer.py --chat --prompt="Who are you?" --temperature=0.7 --top_p=0.9
    python infer.py --checkpoint=runs/tiny/export --prompt_file=prompts.txt > answers.jsonl
    python infer.py                                  # a conversation; /reset begins anew, /exit or Ctrl-D ends it

The text goes to standard output, everything else to standard error. A prompt file holds one prompt per line, or if its
name ends in .jsonl one JSON object per line with the key "prompt"; the answers are JSON objects, one per line. The
figures after the text are those of `models.generate.Timings`: decoding's GB/s are the bytes of the weights and of the
keys and values that it must read at least, over the time that it took. Compiling is in none of the other figures.

Exit codes: 0 done, 2 bad input (one line says what; `python -X dev infer.py` shows where), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from models.batcher import ContinuousBatcher
from models.calibrate import Calibration
from models.compressed import load_decoder
from models.decoder import Decoder
from models.generate import GenerationResult, Generator, Timings
from models.sampling import Sampling
from models.tokenizer import Tokenizer
from pallas_kernels.core import device

PAGE_SIZE = 64  # tokens of a page of the cache that the prompts of a file share
_DTYPES = ("float32", "bfloat16", "float16")


def define_flags() -> flags.FlagValues:
    """The flags of this program. They are its own object, so that importing it defines nothing."""
    values = flags.FlagValues()

    def define(kind: str, name: str, *arguments: Any, **options: Any) -> None:
        getattr(flags, f"DEFINE_{kind}")(name, *arguments, flag_values=values, **options)

    define("string", "checkpoint", "smollm2", "smollm2, a folder (Hugging Face or models.compress), or a .gguf file.")
    define("string", "prompt", None, "Text to continue, or with --chat to answer.")
    define("string", "prompt_file", None, "File of prompts: one a line, or .jsonl with a key named prompt.")
    define("bool", "chat", None, "Apply the model's chat template; by default only in a conversation.")
    define("bool", "add_bos", False, "Begin raw text with the beginning-of-text token, as Llama and Mistral want.")
    define("integer", "max_new_tokens", 256, "Tokens to generate at most.")
    define("float", "temperature", 0.0, "0 takes the likeliest token; more is more random.")
    define("integer", "top_k", None, "Draw from the k likeliest tokens.")
    define("float", "top_p", None, "Draw from the likeliest tokens that have probability p together.")
    define("float", "min_p", None, "Draw from tokens at least min_p times as likely as the likeliest.")
    define("integer", "seed", 0, "The same seed gives the same text.")
    define("multi_string", "stop", [], "Text that ends the answer; may be given several times.")
    define("integer", "batch_size", 8, "Prompts of a file that run at a time; when one is answered the next joins.")
    define("integer", "cache_tokens", None, "Tokens that these hold together; by default batch_size of the longest.")
    define("enum", "dtype", None, _DTYPES, "Of weights and activations; by default bfloat16, on a CPU float32.")
    define("string", "implementation", "auto", "Of attention: auto, or a name, or several in order, with commas.")
    define("bool", "help", False, "Show this.", short_name="h")
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the program; `argv` begins with its name. Returns the exit code."""
    try:
        options = define_flags()
        if unknown := options(argv)[1:]:
            raise ValueError(f"unexpected argument {unknown[0]!r}: a prompt is passed as --prompt={unknown[0]!r}")
        if options.help:
            print(__doc__, options.get_help(), sep="\n")
            return 0
        run(options)
    except (ValueError, OSError, flags.Error) as error:
        if sys.flags.dev_mode:
            raise
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(options: flags.FlagValues) -> None:
    """What the flags ask for. What can be checked without the model is checked before it is loaded."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError("--prompt and --prompt_file exclude each other: pass one of them")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {options.batch_size}")
    if options.cache_tokens is not None and options.cache_tokens < 1:
        raise ValueError(f"--cache_tokens must be at least 1, got {options.cache_tokens}")
    conversation = options.prompt is None and options.prompt_file is None
    if conversation and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError("no prompt: pass --prompt or --prompt_file (a conversation needs a terminal)")
    prompts = [] if options.prompt is None else [options.prompt]
    if options.prompt_file is not None:
        prompts = read_prompts(Path(options.prompt_file))

    here = device.current()
    dtype = jnp.dtype(options.dtype or ("float32" if here.platform == "cpu" else "bfloat16"))
    names = options.implementation.split(",")
    implementation = tuple(names) if len(names) > 1 else names[0]
    decoder, tokenizer = load_decoder(options.checkpoint, dtype=dtype, implementation=implementation)
    if dtype != jnp.float16:  # kernels have no room for an asynchronous softmax's weights in it
        decoder = decoder.calibrated(Calibration.beside(options.checkpoint, decoder.config))
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "sampling": sampling,
        "seed": options.seed,
        "stop": options.stop,
        "add_bos": options.add_bos and not options.chat,  # a chat template writes its own
    }

    if conversation:
        Conversation(Generator(decoder, tokenizer), settings, templated=options.chat).run()
        return
    texts = prompts
    if options.chat:
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    if options.prompt is not None:
        result = Generator(decoder, tokenizer).generate(texts, **settings, stream=show)
        print()
        print(summary(result.timings, str(dtype)), file=sys.stderr)
        return
    timings = answer_all(decoder, tokenizer, prompts, texts, settings, options.batch_size, options.cache_tokens)
    print(summary(timings, str(dtype)), file=sys.stderr)


def answer_all(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    texts: Sequence[str],
    settings: dict[str, Any],
    rows: int,
    cache_tokens: int | None,
) -> Timings:
    """Answers the prompts of a file, which are `texts` to the model; prints in their order, each as soon as it can."""
    longest = max(len(tokenizer.encode(text, add_bos=settings["add_bos"])) for text in texts)
    max_tokens = min(longest + max(1, settings["max_new_tokens"]), decoder.config.max_positions)
    if cache_tokens is not None and cache_tokens < max_tokens:
        raise ValueError(
            f"--cache_tokens={cache_tokens} is less than the {max_tokens} tokens of the longest prompt and its answer: "
            "raise it, or lower --max_new_tokens"
        )
    batcher = ContinuousBatcher(
        decoder,
        tokenizer,
        max_rows=min(rows, len(texts)),
        num_pages=None if cache_tokens is None else -(-cache_tokens // PAGE_SIZE),
        page_size=PAGE_SIZE,
        max_tokens=max_tokens,
    )
    requests = []
    for number, text in enumerate(texts):
        # A prompt is its number to the sampler: its answer does not depend on who runs beside it.
        try:
            requests.append(batcher.submit(text, **settings, request_id=number))
        except ValueError as error:
            raise ValueError(f"prompt {number} of the file: {error}") from error
    printed = 0
    while printed < len(requests):
        batcher.step()
        while printed < len(requests) and requests[printed].finished:
            request = requests[printed]
            answer = {"prompt": prompts[printed], "text": request.text, "finish_reason": request.finish_reason}
            print(json.dumps(answer, ensure_ascii=False), flush=True)
            printed += 1
    return batcher.timings


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file; blank lines do not count. ValueError, with file and line, for what is not a prompt."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: is not valid JSON ({error})") from error
            except (KeyError, TypeError):
                line = None
            if not isinstance(line, str):
                raise ValueError(f'{path}, line {number}: must be an object with a text named "prompt"')
        prompts.append(line)
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return prompts


def show(_row: int, piece: str) -> None:
    print(piece, end="", flush=True)


def summary(timings: Timings, dtype: str) -> str:
    """The figures of a run on one line."""
    here = device.current()
    rate = timings.decode_bytes_per_second
    share = f", {rate / here.memory_bandwidth:.0%} of its memory bandwidth" if here.memory_bandwidth else ""
    return (
        f"[prefill {timings.prefill_tokens} tokens, {timings.prefill_tokens_per_second:.1f} tokens/s; "
        f"decode {timings.decode_tokens} tokens, {timings.decode_tokens_per_second:.1f} tokens/s, "
        f"{rate / 1e9:.1f} GB/s{share}; compiled in {timings.compile_seconds:.1f} s; {here}, {dtype}]"
    )


class Conversation:
    """Questions from the terminal and answers to it, with a memory."""

    def __init__(self, generator: Generator, settings: dict[str, Any], templated: bool | None):
        self._generator = generator
        self._settings = settings
        self._templated = generator.tokenizer.chat_template is not None if templated is None else templated
        self._messages: list[dict[str, str]] = []
        self._dtype = str(generator.decoder.dtype)

    def run(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (lets input() edit lines and remember them)
        about = "A conversation" if self._templated else "This model has no chat template: it continues each line"
        print(f"{about}. /reset begins anew, /exit ends.", file=sys.stderr)
        for line in self._lines():
            if line == "/reset":
                self._messages = []
                continue
            try:
                self._answer(line)
            except ValueError as error:  # too long, most likely; the next line may do better
                print(f"infer.py: {error}", file=sys.stderr)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            if line == "/exit":
                return
            if line:
                yield line

    def _answer(self, line: str) -> None:
        prompt = self._prompt(line)
        pieces: list[str] = []

        def stream(row: int, piece: str) -> None:
            pieces.append(piece)
            show(row, piece)

        result: GenerationResult | None = None
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the answer, not the conversation
            result = self._generator.generate(prompt, **self._settings, stream=stream)
        print()
        if result is not None:
            print(summary(result.timings, self._dtype), file=sys.stderr)
        if self._templated:
            said = [{"role": "user", "content": line}, {"role": "assistant", "content": "".join(pieces)}]
            self._messages += said

    def _prompt(self, line: str) -> str:
        """The text for the model: the whole conversation, without its oldest turns if it has outgrown the model."""
        if not self._templated:
            return line
        room = self._generator.config.max_positions - self._settings["max_new_tokens"]
        while True:
            messages = [*self._messages, {"role": "user", "content": line}]
            prompt = self._generator.tokenizer.apply_chat_template(messages)
            if not self._messages or len(self._generator.encode([prompt])[0]) <= room:
                return prompt
            self._messages = self._messages[2:]
            print("[the oldest turn no longer fits and is forgotten]", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
