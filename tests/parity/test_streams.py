"""Text on both streams, from Python and from below it, is what nbclient would have kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.compare import assert_same, by_stream, notebook_of, run_both

SAME: dict[str, list[str]] = {
    "print": ["print('one')\nprint('two', end='')\nprint()", "print('a', 'b', sep='\\n')"],
    "both-streams": [
        "import sys\nfor n in range(5):\n    print('out', n)\n    print('err', n, file=sys.stderr)",
        "for n in range(3):\n    print('out', n, flush=True)\n    print('err', n, file=sys.stderr, flush=True)",
        "sys.stderr.write('e')\nsys.stdout.write('o')\nsys.stdout.flush()\nsys.stderr.flush()\nprint('after')",
    ],
    "no-newline": [
        "import sys\nsys.stdout.write('no newline')",
        "sys.stdout.write('x');",
        "_ = sys.stdout.writelines(['a', 'b\\n', 'c'])",
        "print(sys.stdout.write('abc'))",
    ],
    "unicode": [
        "print('äöü ß ∑ 漢字 😀 👩‍👩‍👧 \\u202e \\x00 \\x07 \\x1b[31mred\\x1b[0m')",
        "print('lone \\ud800 surrogate'.encode('utf-8', 'backslashreplace'))",
        "print('\\N{COMBINING ACUTE ACCENT}', 'é', '\\u2028', '\\x85', repr('\\t'))",
        "'😀 result'",
    ],
    "carriage-returns": [
        "print('first\\rsecond')",
        "for n in range(20):\n    print(f'\\r{n * 5:3d}%', end='')\nprint('\\r100%')",
        "print('a\\r\\nb\\r\\n\\rc\\b\\bd')",
        "import sys\nfor n in range(30):\n    sys.stderr.write(f'\\r[{\"#\" * n:<30}]')\n    sys.stderr.flush()",
        "for n in range(3):\n    print('line', n, '\\x1b[2K\\x1b[1A', end='\\r', flush=True)",
    ],
    "empty-writes": ["print('', end='')", "print()", "import sys\nsys.stdout.write('')\nsys.stdout.flush()"],
    "large": [
        "print('x' * 3_000_000)",
        "for n in range(40_000):\n    print(n, 'some text that goes on for a while')",
        "import sys\nfor n in range(20_000):\n    print(n, file=sys.stderr)",
        "print('😀' * 500_000)",
        "'y' * 500_000",
    ],
    "write-types": [
        "import sys\ntry:\n    sys.stdout.write(b'bytes')\nexcept TypeError as error:\n    print('TypeError', error)",
        "try:\n    sys.stdout.write(None)\nexcept TypeError as error:\n    print('TypeError', error)",
        "class Text(str):\n    pass\nprint(Text('sub'), sys.stdout.write(Text('class')))",
        "print(sys.stdout.encoding, sys.stdout.errors, sys.stdout.name, sys.stdout.isatty(), sys.stdout.closed)",
        "print(sys.stdout.fileno() > 2, sys.stderr.fileno() > 2, sys.__stdout__.fileno(), sys.__stderr__.fileno())",
        "print(sys.stdout.writable(), sys.stdout.readable(), type(sys.stdout), type(sys.__stdout__))",
        "print(sys.stdin, type(sys.stdin))",
    ],
    "replaced-stdout": [
        "import contextlib, io, sys\nbuffer = io.StringIO()\nwith contextlib.redirect_stdout(buffer):\n    print('caught')\n"
        "print('got', repr(buffer.getvalue()))",
        "old = sys.stdout\nsys.stdout = io.StringIO()\nprint('lost')",
        "kept = sys.stdout.getvalue()\nsys.stdout = old\nprint(repr(kept))",
        "class Tee:\n    def __init__(self, to):\n        self.to = to\n    def write(self, text):\n"
        "        return self.to.write(text.upper())\n    def flush(self):\n        self.to.flush()\n"
        "sys.stdout = Tee(old)\nprint('loud')",
        "sys.stdout = old\nprint('quiet')",
        "with contextlib.redirect_stderr(sys.stdout):\n    print('error to output', file=sys.stderr)",
        "sys.stdout = None\nprint('nowhere')\nsys.stdout = old\nprint('back')",
        "sys.stdout = sys.__stdout__\nprint('to the original descriptor', flush=True)",
        "sys.stdout = old",
    ],
    "logging-and-warnings": [
        "import logging\nlogging.warning('by default to stderr')\nlogging.info('not shown')",
        "logging.basicConfig(force=True, level='DEBUG', format='%(levelname)s %(message)s')\nlogging.debug('shown')",
        "logging.getLogger('x.y').error('an error', exc_info=False)",
        "import warnings\nwarnings.warn('careful')\nwarnings.warn('careful', DeprecationWarning)",
        "def old():\n    warnings.warn('gone soon', DeprecationWarning, stacklevel=2)\nold()",
        "warnings.simplefilter('always')\nfor _ in range(3):\n    warnings.warn('every time', UserWarning)",
        "with warnings.catch_warnings(record=True) as caught:\n    warnings.warn('caught')\nprint(len(caught))",
        "print(len(warnings.filters) > 0, [f[:3] for f in warnings.filters if f[2].__name__ == 'UserWarning'])",
        "logging.captureWarnings(True)\nwarnings.warn('through logging')",
        "print(sorted(n for n in logging.root.manager.loggerDict if 'safe' in n), logging.root.handlers)",
    ],
    "processes": [
        "import os, subprocess, sys\nos.system('echo from a shell')",
        "os.system('echo to stderr >&2; exit 3')",
        "subprocess.run(['echo', 'from a child'])",
        "print(subprocess.run(['echo', 'captured'], capture_output=True, text=True))",
        "os.write(1, b'descriptor one\\n')",
        "os.write(2, b'descriptor two\\n');",
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.puts(b'from C')\nlibc.fflush(None)",
        "subprocess.run([sys.executable, '-c', 'print(6 * 7)'], check=True);",
        "p = subprocess.Popen(['sh', '-c', 'echo first; echo second >&2'])\np.wait()",
        "os.system('seq 1 3000');",
        "os.write(1, '\\u00e4\\U0001f600 split characters\\n'.encode() * 400);",
        "with os.popen('echo popen') as pipe:\n    print(pipe.read())",
    ],
    "fork": [
        "import os, sys\npid = os.fork()\nif pid == 0:\n    print('in the child', flush=True)\n    os._exit(0)\n"
        "_, status = os.waitpid(pid, 0)\nprint('in the parent', status)",
        "pid = os.fork()\nif pid == 0:\n    os.write(1, b'raw from the child\\n')\n    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
    ],
    "pool": [
        "import multiprocessing\ncontext = multiprocessing.get_context('fork')\ndef square(x):\n    return x * x\n"
        "with context.Pool(2) as pool:\n    print(pool.map(square, range(10)))",
        "def loud(x):\n    print('worker', x, flush=True)\n    return x\nwith context.Pool(1) as pool:\n"
        "    print(pool.map(loud, [1, 2]))",
        "from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor\n"
        "with ProcessPoolExecutor(2, mp_context=context) as pool:\n    print(list(pool.map(square, range(5))))",
        "with ThreadPoolExecutor(1) as pool:\n    pool.map(print, ['from', 'a', 'thread'])",
        "def fail(x):\n    raise ValueError(x)\nwith context.Pool(1) as pool:\n    try:\n        pool.map(fail, [1])\n"
        "    except ValueError as error:\n        print('ValueError', error, type(error.__cause__).__name__)",
        "queue = context.Queue()\nprocess = context.Process(target=lambda: queue.put(multiprocessing.current_process().name))\n"
        "process.start()\nprint(queue.get())\nprocess.join()\nprint(process.exitcode)",
    ],
    "threads": [
        "import threading\ndone = threading.Event()\nrelease = threading.Event()\ndef late():\n    print('while it runs')\n"
        "    done.set()\n    release.wait()\n    print('after its cell ended')\n"
        "thread = threading.Thread(target=late)\nthread.start()\ndone.wait()",
        "release.set()\nthread.join()\nprint('next cell')",
        "lock = threading.Lock()\ndef count(n):\n    with lock:\n        print('thread', n)\n"
        "for n in range(8):\n    t = threading.Thread(target=count, args=(n,))\n    t.start()\n    t.join()",
    ],
    "async": [
        "import asyncio\nawait asyncio.sleep(0)\nprint('awaited')",
        "async def twice(x):\n    await asyncio.sleep(0)\n    print('in a coroutine', x)\n    return 2 * x\nawait twice(21)",
        "gate = asyncio.Event()\nasync def background():\n    print('background begins')\n    await gate.wait()\n"
        "    print('background ends')\ntask = asyncio.create_task(background())\nawait asyncio.sleep(0)",
        "gate.set()\nawait task\nprint('done', task.done())",
        "[x async for x in (lambda: (y for y in []))()] if False else 'no'",
        "async def numbers():\n    for n in range(3):\n        yield n\nprint([n async for n in numbers()])",
        "results = await asyncio.gather(*(twice(n) for n in range(3)))\nresults",
        "%autoawait",
    ],
}


@pytest.mark.parametrize("name", SAME)
def test_streams(name: str, tmp_path: Path) -> None:
    pair = run_both(tmp_path, notebook_of(*SAME[name]))
    if name in ("both-streams", "processes"):
        # What came first of two streams, or of a descriptor and sys.stdout, is a race within ipykernel.
        for plain, ours in zip(pair.plain.cells, pair.ours.cells, strict=True):
            assert by_stream(ours.outputs) == by_stream(plain.outputs), plain.source
    assert_same(pair)
