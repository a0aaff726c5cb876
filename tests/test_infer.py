"""infer.py from its command line, on a tiny random checkpoint."""

import builtins
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

import infer
from models import Llama, LlamaConfig, Tokenizer, generate, load_model, save_checkpoint

ROOT = Path(infer.__file__).parent
CONFIG = LlamaConfig(
    vocab_size=320,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=64,
    max_positions=128,
    tie_embeddings=True,
)
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("infer") / "tiny"
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_template = TEMPLATE
    save_checkpoint(folder, Llama(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32), tokenizer)
    return folder


@pytest.fixture
def run(checkpoint, capsys):
    """Calls infer.py with the tiny checkpoint; returns exit code, standard output and standard error."""

    def call(*arguments):
        code = infer.main(["infer.py", f"--checkpoint={checkpoint}", *arguments])
        return code, *capsys.readouterr()

    return call


def test_a_prompt_is_continued_and_the_speed_shown(run, checkpoint):
    code, out, err = run("--prompt=In the beginning", "--max_new_tokens=8")
    assert code == 0
    assert out == generate(*load_model(checkpoint), "In the beginning", 8)[0] + "\n"
    for figure in ("prefill 16 tokens, ", "decode 7 tokens, ", " tokens/s", " GB/s", "cpu, float32]"):
        assert figure in err


def test_the_program_runs_by_itself(checkpoint):
    program = [sys.executable, "infer.py", f"--checkpoint={checkpoint}"]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 120}
    done = subprocess.run([*program, "--prompt=hello", "--max_new_tokens=2"], **options)
    assert (done.returncode, "tokens/s" in done.stderr) == (0, True)
    refused = subprocess.run(program, **options)  # without a prompt or a terminal it must not wait for one
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "infer.py: no prompt: pass --prompt or --prompt_file (a conversation needs a terminal)\n"


def test_every_line_of_a_file_is_answered_whatever_the_batch(run, tmp_path):
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    prompts = ["one", "and two", "three é"]
    lines.write_text("one\n\nand two\nthree é\n", encoding="utf-8")
    objects.write_text("\n".join(json.dumps({"prompt": prompt, "n": 1}) for prompt in prompts), encoding="utf-8")
    flags = ("--max_new_tokens=6", "--temperature=1", "--seed=4")
    code, out, err = run(f"--prompt_file={lines}", "--batch_size=2", *flags)
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts
    assert "prefill 18 tokens" in err  # é is two bytes
    assert run(f"--prompt_file={objects}", "--batch_size=1", *flags)[1] == out


def test_a_small_cache_makes_prompts_wait_and_one_too_small_is_refused(run, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join("a" * length for length in (60, 3, 40, 1)))
    code, out, _ = run(f"--prompt_file={lines}", "--max_new_tokens=8")
    assert (code, out.count("\n")) == (0, 4)
    assert run(f"--prompt_file={lines}", "--max_new_tokens=8", "--cache_tokens=100")[:2] == (0, out)
    code, out, err = run(f"--prompt_file={lines}", "--max_new_tokens=8", "--cache_tokens=67")
    assert (code, out) == (2, "")
    assert err.startswith("infer.py: --cache_tokens=67 is less than the 68 tokens of the longest prompt and its answer")


def test_a_prompt_of_a_file_that_cannot_be_answered_is_named(run, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n" + "a" * 200)
    code, out, err = run(f"--prompt_file={lines}", "--max_new_tokens=8")
    assert (code, out) == (2, "")
    assert "prompt 1 of the file: the prompt has 200 tokens and with max_new_tokens=8 needs 208, more than the" in err


def test_the_chat_template_is_applied_when_asked_for(run, checkpoint):
    model, tokenizer = load_model(checkpoint)
    expected = generate(model, tokenizer, "[user] hi\n[assistant] ", 6)[0]
    assert run("--prompt=hi", "--chat", "--max_new_tokens=6")[1] == expected + "\n"


@pytest.fixture
def terminal(monkeypatch):
    """Plays a user who types the given lines at a terminal."""

    def type_lines(*lines):
        answers = iter(lines)

        def read(_prompt):
            try:
                return next(answers)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    return type_lines


def test_a_conversation_remembers(run, checkpoint, terminal):
    model, tokenizer = load_model(checkpoint)
    first = generate(model, tokenizer, "[user] hi\n[assistant] ", 5)[0]
    history = f"[user] hi\n[assistant] {first}\n"
    second = generate(model, tokenizer, f"{history}[user] so\n[assistant] ", 5)[0]
    terminal("hi", "so", "/reset", "", "hi", "/exit", "never read")
    code, out, err = run("--max_new_tokens=5")
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n")
    assert err.count("tokens/s") == 2 * 3


def test_a_conversation_forgets_what_no_longer_fits_and_goes_on_after_an_error(run, terminal):
    terminal("a" * 80, "b" * 20, "c" * 200, "hi")
    code, out, err = run("--max_new_tokens=5")
    assert code == 0
    assert err.count("the oldest turn no longer fits and is forgotten") == 2
    assert "infer.py: prompt 0 has 220 tokens and with max_new_tokens=5 needs 225, more than the model's" in err
    assert out.count("\n") >= 3


def test_help_lists_the_flags(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "--max_new_tokens" in out
    assert "python infer.py --prompt" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello"], "unexpected argument 'hello': a prompt is passed as --prompt='hello'"),
        (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file exclude each other"),
        (["--prompt=a", "--temprature=1"], "Unknown command line flag 'temprature'"),
        (["--prompt=a", "--top_k=few"], "flag --top_k=few"),
        (["--prompt=a", "--top_p=2"], "top_p must be in (0, 1], or None for no limit, got 2.0"),
        (["--prompt=a", "--dtype=int8"], "value should be one of <float32|bfloat16|float16>"),
        (["--prompt=a", "--batch_size=0"], "--batch_size must be at least 1, got 0"),
        (["--prompt=a", "--cache_tokens=0"], "--cache_tokens must be at least 1, got 0"),
        (["--prompt=a", "--max_new_tokens=0"], "max_new_tokens must be an integer >= 1, got 0"),
        (["--prompt=", "--max_new_tokens=4"], "prompt 0 is empty"),
        (["--prompt=a", "--max_new_tokens=400"], "more than the model's max_positions=128"),
        (["--prompt=a", "--max_new_tokens=4", "--implementation=cudnn"], "implementation must be one of"),
        (["--prompt=a", "--checkpoint=nowhere"], "nowhere"),
        (["--prompt_file=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("infer.py: ")
    assert message in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("latin.txt", "é".encode("latin-1"), "is not UTF-8 text"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": ', "broken.jsonl, line 2: is not valid JSON"),
        ("other.jsonl", b'{"text": "a"}', 'other.jsonl, line 1: must be an object with a text named "prompt"'),
        ("list.jsonl", b"[1]", "list.jsonl, line 1: must be an object"),
        ("number.jsonl", b'{"prompt": 3}', "number.jsonl, line 1: must be an object"),
    ],
)
def test_a_bad_prompt_file_names_file_and_line(run, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    code, out, err = run(f"--prompt_file={tmp_path / name}")
    assert (code, out) == (2, "")
    assert message in err
