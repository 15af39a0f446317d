"""The console scripts: which calls are ours, and that every other call is the Perl interpreter's, unchanged."""

import os
import runpy
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import perlcli
from perlcli import entry, interpreter

REAL_PERL = interpreter.find_interpreter(os.environ.get("PATH", os.defpath))
needs_perl = pytest.mark.skipif(REAL_PERL is None, reason="no Perl interpreter on PATH")
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc: Python's changes stay")

WRAPPER = """\
#!{python}
import sys
from perlcli.entry import perl
if __name__ == '__main__':
    sys.argv[0] = sys.argv[0].removesuffix('.exe')
    sys.exit(perl())
"""
LONG_PATH_WRAPPER = WRAPPER.replace("#!{python}", "#!/bin/sh\n'''exec' '{python}' \"$0\" \"$@\"\n' '''")
FAKE_PERL = """\
#!/bin/sh
echo "fake perl"
[ $# -eq 0 ] || printf '%s\\n' "$@"
exit 3
"""


def write_script(folder: Path, text: str, name: str = "perl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / name
    script.write_text(text)
    script.chmod(0o755)
    return script


def write_wrapper(folder: Path) -> Path:
    """Write the script that pip writes for us, which depends on the length of the interpreter's path."""
    text = WRAPPER if len(sys.executable) < 120 and " " not in sys.executable else LONG_PATH_WRAPPER
    return write_script(folder, text.format(python=sys.executable))


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Our script `perl` in an environment of its own."""
    return write_wrapper(tmp_path / "environment" / "bin")


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A stand-in for the Perl interpreter that prints its arguments, a line each, and exits with 3."""
    return write_script(tmp_path / "fake" / "bin", FAKE_PERL)


@pytest.fixture
def real() -> Path:
    assert REAL_PERL is not None
    return Path(REAL_PERL)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The calls that reach our commands, recorded instead of run."""
    calls: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "perlcli.cli.app", SimpleNamespace(main=lambda: calls.append(sys.argv)))
    return calls


def environment(*scripts: Path, **variables: str) -> dict[str, str]:
    """Return the environment in which the folders of `scripts` are PATH."""
    source = str(Path(perlcli.__file__).parents[1])
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON", "_PERL"))
    }
    path = os.pathsep.join(str(script.parent) for script in scripts)
    return kept | {"PATH": path, "PYTHONPATH": source} | variables


def call(command: list, env: dict[str, str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=env, capture_output=True, timeout=60, check=False, **options)


# Which calls are ours


@pytest.mark.parametrize("first", [*entry.COMMANDS, *entry.OPTIONS])
def test_commands_and_options_are_ours(first: str, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert entry.is_ours([first])
    assert entry.is_ours([first, "-e", "1"])
    monkeypatch.setattr(sys, "argv", ["/bin/perl", first, "--seed", "1"])
    entry.perl()
    assert commands == ([] if first == "--version" else [["/bin/perl", first, "--seed", "1"]])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-e", "sft"],
        ["-h"],
        ["-v"],
        ["-V:version"],
        ["-ne", "print"],
        ["script.pl", "sft"],
        ["./sft"],
        ["--", "sft"],
        ["--help=x"],
        ["sft.pl"],
        ["SFT"],
        ["sf"],
        [""],
        ["-"],
        ["-w", "--help"],
    ],
)
def test_every_other_call_is_perls(arguments: list[str]) -> None:
    assert not entry.is_ours(arguments)


def test_completion_requests_are_ours(commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["perl"])
    monkeypatch.setenv("_PERL_COMPLETE", "complete_bash")
    entry.perl()
    assert commands == [["perl"]]
    monkeypatch.setenv("_PERL_COMPLETE", "")
    assert not entry.is_ours([])


def test_perlcli_and_the_module_are_always_ours(commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["perlcli", "-e", "1"])
    entry.perlcli()
    assert commands == [["perlcli", "-e", "1"]]
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("perlcli", run_name="__main__")
    assert stop.value.code == 0
    assert commands == [["perlcli", "-e", "1"]] * 2


def test_exit_code_of_our_commands_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "perlcli.cli.app", SimpleNamespace(main=lambda: sys.exit(2)))
    monkeypatch.setattr(sys, "argv", ["perl", "sft"])
    with pytest.raises(SystemExit) as stop:
        entry.perl()
    assert stop.value.code == 2


def test_version_is_told_without_typer(ours: Path, fake: Path) -> None:
    env = environment(ours, fake, PYTHONPROFILEIMPORTTIME="1")
    for command in ([ours, "--version"], [sys.executable, "-m", "perlcli", "--version"]):
        result = call(command, env)
        assert result.returncode == 0
        assert result.stdout == f"perlcli {perlcli.__version__}\n".encode()
        assert not imported(result) & {"typer", "click", "torch", "perlcli.cli.app"}


def test_command_wins_over_a_file_of_its_name(ours: Path, fake: Path, tmp_path: Path) -> None:
    write_script(tmp_path, "print 1", "--version")
    assert call([ours, "--version"], environment(ours, fake), cwd=tmp_path).stdout.startswith(b"perlcli ")
    result = call([ours, "./--version"], environment(ours, fake), cwd=tmp_path)
    assert result.stdout == b"fake perl\n./--version\n"


# The hand-over


def test_arguments_and_exit_code_are_kept(ours: Path, fake: Path) -> None:
    result = call([ours, "-e", "", "a b", "*", "--help", "-x\ny"], environment(ours, fake))
    assert result.stdout == b"fake perl\n-e\n\na b\n*\n--help\n-x\ny\n"
    assert (result.returncode, result.stderr) == (3, b"")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX", ""])
def test_argument_bytes_are_kept(locale: str, ours: Path, fake: Path) -> None:
    arguments = [b"-e", b"\xff\xfe", "é".encode(), bytes(range(1, 256)).replace(b"\n", b"")]
    result = call([os.fsencode(ours), *arguments], environment(ours, fake, LC_ALL=locale))
    assert result.stdout == b"fake perl\n" + b"".join(argument + b"\n" for argument in arguments)


@needs_proc
@pytest.mark.parametrize("variables", [{}, {"LANG": "C"}, {"LC_CTYPE": "C"}, {"LC_CTYPE": "C.UTF-8"}])
def test_environment_is_kept(variables: dict[str, str], ours: Path, tmp_path: Path) -> None:
    env_printer = write_script(tmp_path / "env", "#!/bin/sh\nexec /usr/bin/env\n")
    env = environment(ours, env_printer, **variables)
    direct, handed_over = call([env_printer], env), call([ours], env)
    unstable = (b"_=", b"PWD=", b"SHLVL=")  # the shell's own
    lines = [
        {line for line in result.stdout.splitlines() if not line.startswith(unstable)}
        for result in (direct, handed_over)
    ]
    assert lines[0] == lines[1] != set()


@needs_perl
def test_program_on_standard_input(ours: Path, real: Path) -> None:
    result = call([ours], environment(ours, real), input=b"print 6 * 7; exit 5")
    assert (result.stdout, result.returncode) == (b"42", 5)


@needs_perl
def test_filter_reads_all_of_standard_input(ours: Path, real: Path) -> None:
    lines = b"".join(b"%d\n" % number for number in range(20_000))
    result = call([ours, "-ne", "print if /7$/"], environment(ours, real), input=lines)
    assert result.stdout == b"".join(b"%d\n" % number for number in range(7, 20_000, 10))


@needs_perl
def test_env_script(ours: Path, real: Path, tmp_path: Path) -> None:
    script = write_script(tmp_path, '#!/usr/bin/env perl\nuse strict; print "@ARGV"; exit 4', "hello.pl")
    result = call([script, "sft", "--help"], environment(ours, real))
    assert (result.stdout, result.returncode, result.stderr) == (b"sft --help", 4, b"")


@needs_perl
@pytest.mark.parametrize("arguments", [["-v"], ["-h"], ["-MConfig", "-e", "print $^X, $Config{version}"], ["--", "no"]])
def test_output_equals_the_interpreters(arguments: list[str], ours: Path, real: Path, tmp_path: Path) -> None:
    env = environment(ours, real)
    direct, handed_over = (call([perl, *arguments], env, cwd=tmp_path) for perl in (real, ours))
    assert handed_over.stdout == direct.stdout
    assert handed_over.stderr == direct.stderr
    assert handed_over.returncode == direct.returncode


@needs_perl
def test_interpreter_takes_the_place_of_the_process(ours: Path, real: Path) -> None:
    program = "$| = 1; print $$; sleep 60"
    with subprocess.Popen([ours, "-e", program], env=environment(ours, real), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(len(str(process.pid))) == str(process.pid).encode()
        process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM


@needs_perl
def test_death_by_signal_is_kept(ours: Path, real: Path) -> None:
    assert call([ours, "-e", "kill TERM => $$; sleep 9"], environment(ours, real)).returncode == -signal.SIGTERM


@needs_perl
def test_closed_pipe_ends_the_interpreter(ours: Path, real: Path) -> None:
    program = 'print "x\n" while 1'
    with subprocess.Popen([ours, "-e", program], env=environment(ours, real), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == -signal.SIGPIPE


# Which interpreter


def test_no_interpreter(ours: Path) -> None:
    result = call([ours, "-e", "1"], environment(ours))
    problem, hint = result.stderr.decode().splitlines()
    assert result.returncode == 127
    assert problem == "perlcli: no Perl interpreter on PATH to hand this call to"
    assert hint.startswith("Hint: install Perl")


def test_two_environments_do_not_call_each_other(ours: Path, fake: Path, tmp_path: Path) -> None:
    other = write_wrapper(tmp_path / "other" / "bin")
    long_path = write_script(tmp_path / "long" / "bin", LONG_PATH_WRAPPER.format(python=sys.executable))
    for script in (ours, other, long_path):
        result = call([script, "-e"], environment(ours, other, long_path, ours, fake))
        assert result.stdout == b"fake perl\n-e\n"
        assert call([script, "-e"], environment(other, ours, long_path)).returncode == 127


def test_symbolic_links_to_ourselves_are_skipped(ours: Path, fake: Path, tmp_path: Path) -> None:
    link = tmp_path / "link" / "perl"
    link.parent.mkdir()
    link.symlink_to(ours)
    for script in (link, ours):
        assert call([script, "-e"], environment(link, ours, fake)).stdout == b"fake perl\n-e\n"


@pytest.mark.parametrize("mark", ["export PYENV_ROOT=~/.pyenv", "# asdf-plugin: python 3.12.1"])
def test_shims_of_python_version_managers_are_skipped(mark: str, ours: Path, fake: Path, tmp_path: Path) -> None:
    shim = write_script(tmp_path / "shims", f'#!/bin/sh\n{mark}\nexec "{ours}" "$@"\n')
    for script in (shim, ours):
        assert call([script, "-e"], environment(shim, ours, fake)).stdout == b"fake perl\n-e\n"
        assert call([script, "-e"], environment(ours, shim)).returncode == 127


def test_ourselves_are_skipped_where_we_are_no_script(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = write_script(tmp_path / "packed", "PK: an archive that starts itself")
    monkeypatch.setattr(sys, "argv", [str(packed)])
    assert interpreter.find_interpreter(f"{packed.parent}:{fake.parent}") == str(fake)


def test_what_cannot_run_is_skipped(tmp_path: Path, fake: Path) -> None:
    (tmp_path / "folder" / "perl").mkdir(parents=True)
    write_script(tmp_path / "plain", FAKE_PERL).chmod(0o644)
    path = f"{tmp_path}/folder:{tmp_path}/plain:{tmp_path}/missing:{fake.parent}"
    assert interpreter.find_interpreter(path) == str(fake)


def test_empty_entry_of_path_is_the_current_folder(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fake.parent)
    assert interpreter.find_interpreter(":/nowhere") == "./perl"


def test_interpreter_that_does_not_start(ours: Path, tmp_path: Path) -> None:
    broken = write_script(tmp_path / "broken", "#!/nowhere/interpreter\n")
    result = call([ours, "-e", "1"], environment(ours, broken))
    problem, hint = result.stderr.decode().splitlines()
    assert result.returncode == 126
    assert str(broken) in problem
    assert hint.startswith("Hint: ")


# Near misses


@pytest.mark.parametrize(
    ("typed", "command"), [("rewrad", "reward"), ("SFT", "sft"), ("evla", "eval"), ("quick-start", "quickstart")]
)
def test_near_miss_names_the_command(typed: str, command: str, ours: Path, fake: Path) -> None:
    result = call([ours, typed, "-x"], environment(ours, fake))
    assert result.stderr.decode() == f"perlcli: did you mean 'perl {command}'?\n"
    assert result.stdout.decode() == f"fake perl\n{typed}\n-x\n"


def test_no_suggestion_for_files_options_and_other_words(ours: Path, fake: Path, tmp_path: Path) -> None:
    write_script(tmp_path, "print 1", "rewrad")
    for first in ("rewrad", "-sft", "--halp", "script.pl", b"\xff", ""):
        assert call([ours, first], environment(ours, fake), cwd=tmp_path).stderr == b""


# A person at a terminal


def on_terminal(command: list, env: dict[str, str], cwd: Path) -> tuple[int, str]:
    """The exit code and the output of a command whose standard input and output are a terminal."""
    leader, follower = os.openpty()
    try:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdin=follower, stdout=follower, stderr=follower)
    finally:
        os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(leader)
    return process.wait(60), shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["help"]], ids=str)
def test_help_is_ours_on_a_terminal(arguments: list[str], ours: Path, fake: Path, tmp_path: Path) -> None:
    code, shown = on_terminal([ours, *arguments], environment(ours, fake), tmp_path)
    assert (code, "quickstart" in shown, "fake perl" in shown) == (0, True, False)


def test_help_of_a_command_on_a_terminal(ours: Path, fake: Path, tmp_path: Path) -> None:
    code, shown = on_terminal([ours, "help", "merge"], environment(ours, fake), tmp_path)
    assert (code, shown.splitlines()[0]) == (0, "Usage: perl merge [OPTIONS] ADAPTER")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("chat", "did you mean 'perl eval'?"),
        ("generate", "did you mean 'perl eval'?"),
        ("train", "did you mean 'perl sft'?"),
        ("rewrad", "did you mean 'perl reward'?"),
        ("QUICKSTART", "did you mean 'perl quickstart'?"),
        ("zzz", "'perl --help' lists the commands"),
    ],
)
def test_an_unknown_word_on_a_terminal_is_one_sentence(
    word: str, hint: str, ours: Path, fake: Path, tmp_path: Path
) -> None:
    code, shown = on_terminal([ours, word, "--model", "x"], environment(ours, fake), tmp_path)
    assert (code, shown) == (2, f"perlcli: there is no command '{word}' and no file of that name; {hint}\n")


@pytest.mark.parametrize("arguments", [["chat"], ["help"], ["./chat"], ["-e", "1"], ["-v"], ["no.pl"], ["a/b"], ["-"]])
def test_scripts_and_options_on_a_terminal_are_perls(
    arguments: list[str], ours: Path, fake: Path, tmp_path: Path
) -> None:
    for name in ("chat", "help"):  # scripts of these names
        (tmp_path / name).touch()
    code, shown = on_terminal([ours, *arguments], environment(ours, fake), tmp_path)
    assert (code, shown) == (3, "".join(f"{line}\n" for line in ("fake perl", *arguments)))


def test_pipes_on_a_terminal_are_perls(ours: Path, fake: Path, tmp_path: Path) -> None:
    shell = "echo 'print 1' | perl; perl chat < /dev/null; perl help < /dev/null"
    pipes = [part.replace("/dev/null", os.devnull) for part in shell.split("; ")]
    shown = [on_terminal(["/bin/sh", "-c", pipe], environment(ours, fake, Path("/bin/x")), tmp_path) for pipe in pipes]
    assert shown == [(3, "fake perl\n"), (3, "fake perl\nchat\n"), (3, "fake perl\nhelp\n")]


def test_what_is_meant_is_a_command() -> None:
    assert {*entry.MEANT.values()} <= {*entry.COMMANDS, *entry.OPTIONS}
    assert not {*entry.MEANT} & {*entry.COMMANDS}


def test_help_is_another_word_for_the_option(commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ([], ["-h"], ["help"], ["help", "sft"]):
        monkeypatch.setattr(sys, "argv", ["perlcli", *words])
        entry.perlcli()
    assert [call[1:] for call in commands] == [["--help"], ["--help"], ["--help"], ["sft", "--help"]]


# What it costs


def imported(result: subprocess.CompletedProcess) -> set[str]:
    """Return the modules in what PYTHONPROFILEIMPORTTIME=1 printed before the process was replaced."""
    lines = result.stderr.decode().splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def test_hand_over_imports_nothing_else(ours: Path, fake: Path, tmp_path: Path) -> None:
    env = environment(ours, fake, PYTHONPROFILEIMPORTTIME="1")
    empty = write_script(tmp_path, "import sys", "empty.py")
    before = imported(call([sys.executable, empty], env))
    ours_alone = imported(call([ours, "-e", "1"], env)) - before
    assert ours_alone - {"_signal"} == {"perlcli", "perlcli.entry", "perlcli.interpreter"}


@pytest.mark.slow
@needs_perl
def test_hand_over_takes_less_than_60_ms(ours: Path, real: Path) -> None:
    env = environment(ours, real)

    def milliseconds(perl: Path) -> float:
        start = time.perf_counter()
        subprocess.run([perl, "-e", "1"], env=env, check=True)
        return 1000 * (time.perf_counter() - start)

    def extra() -> float:
        return statistics.median(milliseconds(ours) - milliseconds(real) for _ in range(9))

    assert any(extra() < 60 for _ in range(5))  # the further rounds are for a machine that is busy with something else
