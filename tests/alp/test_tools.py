"""The sandbox under attack, the pool when workers die, and the text of a result."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from alp.config import ToolsConfig
from alp.errors import UserError
from alp.setup import make_tool
from alp.tools.monty import MontyTool
from alp.tools.tool import MAX_CODE, MAX_OUTPUT, STATUSES, ToolResult, last_line

TIMEOUT_S = 0.5


@pytest.fixture(scope="module")
def tool() -> MontyTool:
    return MontyTool(4, timeout=TIMEOUT_S, memory_mib=64)


def one(tool: MontyTool, code: str) -> ToolResult:
    (result,) = tool.run([code])
    return result


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # the process has ended
        return False


def workers(parent: int | None = None) -> list[int]:
    """Return the processes that this one, or `parent`, has started to run scripts."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, started_by = rest.split()[:2]
        if name == "monty" and state != "Z" and int(started_by) == (parent or os.getpid()):
            found.append(int(stat.parent.name))
    return found


def test_what_is_printed_comes_back_and_a_value_does_not(tool: MontyTool) -> None:
    assert one(tool, "x = 347 * 58\nprint(x)\nprint('é', end='')")[:3] == ("ok", "20126\né", "")
    assert one(tool, "347 * 58")[:3] == ("ok", "", "")
    assert one(tool, "")[:3] == ("ok", "", "")
    assert one(tool, "import sys\nprint('a', file=sys.stderr)\nprint('b')")[:2] == ("ok", "b\n")


def test_results_come_in_order_and_scripts_share_nothing(tool: MontyTool) -> None:
    results = tool.run([f"x = {i}\nprint(x)" if i % 2 == 0 else "print(x)" for i in range(60)])
    assert [r.stdout for r in results[::2]] == [f"{i}\n" for i in range(0, 60, 2)]
    assert {r.error for r in results[1::2]} == {"NameError: name 'x' is not defined"}
    assert tool.run([]) == []


def test_a_script_prints_the_same_every_time(tool: MontyTool) -> None:
    code = "import random, time, datetime\nprint(random.random(), time.time(), datetime.datetime.now())"
    assert len({r.stdout for r in tool.run([code] * 8)}) == 1


# what a script must not reach: (code, start of the error)
FORBIDDEN = {
    "fork": ("import os\nos.fork()", "AttributeError"),
    "fork by name": ("from os import fork", "ImportError"),
    "shell": ("import os\nos.system('touch ESCAPED')", "AttributeError"),
    "kill": ("import os\nos.kill(1, 9)", "AttributeError"),
    "subprocess": ("import subprocess", "ModuleNotFoundError"),
    "threads": ("import threading", "ModuleNotFoundError"),
    "ctypes": ("import ctypes", "ModuleNotFoundError"),
    "read a file": ("print(open('/etc/passwd').read())", "PermissionError"),
    "read a path": ("from pathlib import Path\nprint(Path('/etc/hostname').read_text())", "PermissionError"),
    "list a folder": ("import os\nprint(os.listdir('/'))", "PermissionError"),
    "write a file": ("open('ESCAPED', 'w').write('x')", "PermissionError"),
    "write a path": ("from pathlib import Path\nPath('ESCAPED').write_text('x')", "PermissionError"),
    "environment": ("import os\nprint(os.environ)", "RuntimeError"),
    "a variable": ("import os\nprint(os.getenv('HOME'))", "RuntimeError"),
    "sockets": ("import socket", "ModuleNotFoundError"),
    "urls": ("import urllib.request", "ModuleNotFoundError"),
    "subclasses": ("print(().__class__.__bases__[0].__subclasses__())", "AttributeError"),
    "builtins": ("print(__builtins__)", "NameError"),
    "import by name": ("__import__('os').fork()", ""),
    "input": ("print(input())", "NameError"),
}


@pytest.mark.parametrize("attack", FORBIDDEN)
def test_nothing_of_the_host_is_reached(
    tool: MontyTool, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = FORBIDDEN[attack]
    result = one(tool, code)
    assert result.status == "error" and result.stdout == "" and result.error.startswith(error), result
    assert list(tmp_path.iterdir()) == [] and result.seconds < 1


# resources that a script must not exhaust: (code, statuses it may end with)
HUNGRY = {
    "endless loop": ("while True: pass", {"timeout"}),
    "endless loop that catches": (
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        {"timeout"},
    ),
    "endless sleep": ("import time\nwhile True: time.sleep(60)", {"timeout", "error"}),
    "endless host calls": (
        "import os\nwhile True:\n  try: os.getenv('a')\n  except Exception: pass",
        {"timeout", "error"},
    ),
    "a big product": ("import math\nprint(math.factorial(10**7))", {"timeout", "memory"}),
    "a doubling list": ("x = [0]\nwhile True: x = x + x", {"memory", "timeout"}),
    "a long string": ("x = 'x' * 10**10", {"memory"}),
    "a long number": ("x = 10**10**10", {"memory"}),
    "wide formatting": ("x = '{:>100000000000}'.format(1)", {"memory", "timeout"}),
    "memory that catches": (
        "x = []\nwhile True:\n  try: x.append('a' * 10**6)\n  except MemoryError: pass",
        {"memory", "timeout"},
    ),
    "deep calls": ("def f(n): return f(n + 1)\nf(0)", {"error"}),
    "deep calls that catch": ("def f():\n  try: f()\n  except RecursionError: f()\nf()", {"error", "timeout"}),
    "deep brackets": ("(" * 20000 + ")" * 20000, {"error"}),
    "deep signs": ("-" * 60000 + "1", {"error"}),
    "deep lists": ("x = []\nfor i in range(100000): x = [x]\nprint(x == x)", {"ok", "error", "memory", "timeout"}),
    "a script of many lines": ("x = 1\n" * 10000, {"ok"}),
}


@pytest.mark.parametrize("attack", HUNGRY)
def test_every_limit_holds_and_the_pool_serves_on(tool: MontyTool, attack: str) -> None:
    code, statuses = HUNGRY[attack]
    start = time.monotonic()
    result = one(tool, code)
    assert result.status in statuses, result
    assert time.monotonic() - start < TIMEOUT_S + 3
    assert result.status == "ok" or result.error
    assert one(tool, "print(1)").stdout == "1\n"


def test_output_is_limited(tool: MontyTool) -> None:
    for code in ("print('a' * 10**7)", "for i in range(10**6): print('a' * 100)", "print(*range(10**6))"):
        result = one(tool, code)
        assert result.status in ("memory", "timeout") and len(result.stdout) <= MAX_OUTPUT, result.status


def test_any_text_gets_an_answer(tool: MontyTool) -> None:
    junk = [
        "print('\ud800')",
        "\x00",
        "print('a\x00b')",
        "\u202e\ufeff",
        "print('漢字😀\u0301')",
        "\r\n\x0c\t",
        "é = 1\nprint(é)",
        "a" * (MAX_CODE + 1),
    ]
    results = tool.run(junk)
    assert results[0].status == "refused" and "not text" in results[0].error
    assert results[-1].status == "refused" and str(MAX_CODE) in results[-1].error
    assert results[2].stdout == "a\x00b\n" and results[4].stdout == "漢字😀\u0301\n" and results[6].stdout == "1\n"
    assert all(r.status in STATUSES for r in results)
    for r in results:
        (r.stdout + r.error).encode()


def test_a_thousand_calls_survive_workers_killed_from_outside() -> None:
    pool = MontyTool(10, timeout=5)
    assert len(workers()) >= 10
    killed, is_over = 0, threading.Event()

    def kill() -> None:
        nonlocal killed
        while not is_over.wait(0.01):
            for pid in workers()[::10]:  # every tenth
                os.kill(pid, signal.SIGKILL)
                killed += 1

    killer = threading.Thread(target=kill)
    killer.start()
    start = time.monotonic()
    try:
        results = pool.run([f"x = 0\nfor i in range(5000): x += i % 7\nprint(x, {i})" for i in range(1000)])
    finally:
        is_over.set()
        killer.join()
    assert time.monotonic() - start < 40 and killed >= 10
    expected = sum(i % 7 for i in range(5000))
    statuses = Counter(r.status for r in results)
    assert statuses["ok"] >= 980 and statuses.keys() <= {"ok", "crashed"}, statuses
    assert all(r.stdout == f"{expected} {i}\n" for i, r in enumerate(results) if r.status == "ok")
    assert all("crashed" in r.error for r in results if r.status == "crashed")
    assert [r.stdout for r in pool.run(["print(7)"] * 20)] == ["7\n"] * 20


def test_a_pool_without_its_program_says_crashed_and_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydantic_monty._binary import find_monty_binary

    program = tmp_path / "monty"
    program.write_bytes(Path(find_monty_binary()).read_bytes())
    program.chmod(0o700)
    others = workers()
    monkeypatch.setenv("MONTY_BIN", str(program))
    pool = MontyTool(1)
    assert one(pool, "print(1)").status == "ok"
    program.unlink()
    for pid in set(workers()) - set(others):
        os.kill(pid, signal.SIGKILL)
    result = one(pool, "print(1)")
    assert result.status == "crashed" and "spawn" in result.error and result.seconds < 5
    with pytest.raises(UserError, match="its workers cannot be started"):
        MontyTool(1)


def test_the_workers_end_with_the_tool_and_with_the_process() -> None:
    others = set(workers())
    pool = MontyTool(2)
    mine = set(workers()) - others
    assert len(mine) == 2
    del pool
    deadline = time.monotonic() + 5
    while mine & set(workers()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    code = "import os\nfrom alp.tools.monty import MontyTool\npool = MontyTool(2)\nprint('up', flush=True)\ninput()"
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        theirs = workers(process.pid)
        assert len(theirs) == 2
        process.kill()
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in theirs):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(UserError, match=r"pip install 'alp-kernels\[train\]'"):
        make_tool(ToolsConfig(max_turns=2))


def test_the_last_line_that_says_something() -> None:
    assert last_line("Traceback\n  x\nValueError: no\n\n") == "ValueError: no" and last_line(" \n") == ""
