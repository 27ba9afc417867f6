"""What a notebook can see of its own process is the same, apart from what no output should depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.compare import Pair, assert_same, notebook_of, run_both

SAME: dict[str, list[str]] = {
    "process": [
        "import os, sys\nprint(os.getcwd())",
        "print(__name__, sys.modules['__main__'].__name__, sys.modules['__main__'].__dict__ is globals())",
        "print(sys.modules['__main__'], getattr(sys.modules['__main__'], '__file__', None), __doc__, __spec__, __package__, __loader__)",
        "print(sorted(name for name in globals() if not name.startswith('_i')))",
        "print(sys.path)",
        "print(sys.argv[0], len(sys.argv), [a for a in sys.argv if not a.endswith('.json')][1:])",
        "print(sys.flags)",
        "print(sys.orig_argv[1:2], sys.executable, sys.prefix)",
        "print(sorted(k for k in os.environ if not k.startswith(('SAFE_EXEC_TEST', 'COLUMNS', 'LINES'))))",
        "print({k: v for k, v in os.environ.items() if k in ('HOME', 'PATH', 'LANG', 'PYTHONPATH', 'MPLBACKEND', 'TERM', 'PWD')})",
        "print(sys.getrecursionlimit(), sys.getswitchinterval(), sys.gettrace(), sys.getprofile(), sys.breakpointhook)",
        "print(sys.excepthook, sys.unraisablehook, sys.displayhook, sys.meta_path, sys.path_hooks)",
        "import signal\nprint({s.name: signal.getsignal(s) for s in signal.Signals})",
        "print([line for line in open('/proc/self/status') if line.startswith(('SigBlk', 'SigIgn', 'Umask'))])",
        "print(os.umask(0o22), os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0) == os.sched_getaffinity(os.getppid()))",
        "import locale\nprint(locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(), sys.getfilesystemencoding())",
        "print([f for f in map(int, os.listdir('/proc/self/fd')) if os.path.exists(f'/proc/self/fd/{f}') and os.get_inheritable(f)])",
        "import gc, atexit, asyncio\nprint(gc.isenabled(), gc.get_threshold(), gc.callbacks)",
        "print(type(asyncio.get_event_loop()), asyncio.get_event_loop().is_running(), asyncio.get_event_loop_policy())",
        "print(len(asyncio.all_tasks()) > 0)",
        "print(sorted(m for m in sys.modules if 'safe' in m.lower() or m == 'inside'))",
        "print('runpy' in sys.modules, 'ctypes' in sys.modules, '__mp_main__' in sys.modules)",
        "import warnings\nprint(warnings.filters)",
    ],
    "threads": [
        "import threading\nprint(sorted(t.name for t in threading.enumerate()), threading.active_count())",
        "print(threading.current_thread(), threading.main_thread() is threading.current_thread())",
        "print(threading.excepthook, threading.gettrace() if hasattr(threading, 'gettrace') else None)",
    ],
    "ipython": [
        "shell = get_ipython()\nprint(type(shell), shell.kernel.__class__, shell.config)",
        "print(shell.execution_count, shell.user_ns is globals(), shell.parent)",
        "print(sorted(type(t).__name__ for t in shell.ast_transformers), shell.input_transformers_post, shell.loop_runner_map)",
        "print(shell.events.callbacks)",
        "print(shell.kernel.kernel_info['implementation'], shell.kernel.shell_streams is not None)",
        "print(type(shell.history_manager), shell.history_manager.hist_file, shell.history_manager.enabled)",
        "print(list(shell.history_manager.get_range(raw=True)))",
        "%history",
        "print(shell.kernel.config)",
        "print([n for n in shell.magics_manager.magics['cell']])",
        "print(type(shell.display_pub), type(shell.displayhook), shell.display_formatter.active_types)",
        "print(shell.showtraceback, shell.custom_exceptions, shell.InteractiveTB.__class__)",
        "shell.run_cell('print(1)\\n2')",
        "shell.run_cell_async('3')",
        "print(shell.getoutput('echo out'), shell.system('echo sys'))",
        "shell.kernel.session.username, shell.kernel.user_ns is globals(), shell.kernel.do_execute.__name__",
        "shell.events.register('post_execute', lambda: print('post execute'))",
        "print('with a hook')",
        "shell.set_next_input('x = 1')\n%page 1",
        "import ipykernel\nprint(ipykernel.get_connection_info(unpack=True)['transport'] in ('ipc', 'tcp'))",
    ],
    "sources": [
        "import inspect\ndef first(x):\n    '''A docstring.'''\n    return x + 1\nprint(inspect.getsource(first))",
        "class Thing:\n    def method(self):\n        return 1\nprint(inspect.getsource(Thing.method))",
        "print(inspect.getsource(lambda: 1))",
        "first?",
        "first??",
        "print(inspect.signature(first), first.__module__, first.__qualname__, first.__code__.co_filename)",
        "print(__file__ if '__file__' in globals() else 'no file')",
        "import traceback\ntraceback.print_stack(limit=2)",
        "import sys\nframe, names = sys._getframe(), []\nwhile frame:\n    names.append(frame.f_code.co_name)\n    frame = frame.f_back\nprint(names)",
        "import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    traceback.print_exc()",
        "import doctest\ndef doubled(x):\n    '''\n    >>> doubled(2)\n    4\n    '''\n    return 2 * x\nprint(doctest.testmod())",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(1, 1)\n"
        "result = unittest.main(argv=[''], exit=False, verbosity=0).result\nprint(result.wasSuccessful())",
    ],
    "pickle": [
        "import pickle, multiprocessing\ndef f(x):\n    return x * 2\nprint(pickle.loads(pickle.dumps(f)) is f, pickle.dumps(f))",
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n    print(pool.map(f, [1, 2, 3]))",
        "class P:\n    def __init__(self, x):\n        self.x = x\nprint(pickle.loads(pickle.dumps(P(4))).x)",
        "import dataclasses, enum\n@dataclasses.dataclass\nclass D:\n    n: int = 3\nprint(pickle.loads(pickle.dumps(D())), f.__module__)",
    ],
    "tracing": [
        "import sys\nlines = []\ndef tracer(frame, event, arg):\n    if frame.f_code.co_name == 'traced':\n"
        "        lines.append((event, frame.f_lineno))\n    return tracer",
        "def traced(n):\n    total = 0\n    for i in range(n):\n        total += i\n    return total\nsys.settrace(tracer)\ntraced(3)\nsys.settrace(None)",
        "print(lines, sys.gettrace())",
        "calls = []\ndef profiler(frame, event, arg):\n    if event == 'call':\n        calls.append(frame.f_code.co_name)\n"
        "sys.setprofile(profiler)\ntraced(2)\nsys.setprofile(None)\nprint(calls.count('traced'))",
        "%%prun -q -s cumulative\ntraced(10)",
        "import cProfile, pstats\np = cProfile.Profile()\np.runcall(traced, 5)\n"
        "print(sorted(set(f[2] for f in pstats.Stats(p).stats)))",
        "import tracemalloc\ntracemalloc.start()\nx = [0] * 1000\nprint(tracemalloc.get_traced_memory()[0] > 0)\ntracemalloc.stop()",
        "import faulthandler\nfaulthandler.enable()\nprint(faulthandler.is_enabled())\nfaulthandler.disable()\nprint(faulthandler.is_enabled())",
        "print(faulthandler.enable(), faulthandler.enable)",
        "with open('fault.txt', 'w') as file:\n    faulthandler.enable(file)\n    faulthandler.dump_traceback(file, all_threads=False)\n    faulthandler.disable()\n"
        "print([line for line in open('fault.txt') if 'kernel.py' not in line][:2])",
        "import os, pickle\nprint(os._exit.__doc__, os._exit.__name__, pickle.loads(pickle.dumps(os._exit)) is os._exit)",
    ],
    "files": [
        "print(open('data.txt').read())",
        "open('written.txt', 'w').write('x' * 10)",
        "import os, pathlib\nprint(sorted(os.listdir('.')))",
        "import helper\nprint(helper.VALUE, helper.__file__)",
        "%run script.py one two",
        "%%writefile made.py\nMADE = 5",
        "import made\nmade.MADE",
        "!cat made.py; ls",
        "%cd sub\n%pwd",
        "%cd -q ..\n!pwd",
        "os.chdir('sub')\nprint(os.path.exists('../data.txt'))",
    ],
    "magics": [
        "%%bash\necho from bash\necho to stderr >&2",
        "%%bash --out text --err problem\necho kept",
        "print(repr(text), repr(problem))",
        "%%capture caught\nprint('captured')\n5",
        "print(caught.stdout, caught.outputs)\ncaught()",
        "%%time\npass",
        "!echo shell; echo more",
        "lines = !seq 3\nprint(lines, type(lines).__name__)",
        "name = 'value'\n!echo {name} $name",
        "%%sh\nprintf 'no newline'",
        "%%python3\nprint('another python')",
        "%%html\n<b>html</b>",
        "%%latex\n$x$",
        "%%markdown\n# m",
        "%%javascript\n1",
        "%%svg\n<svg/>",
        "%%script cat\ninput text",
        "%env SOME_NAME=some value\n!echo $SOME_NAME",
        "%who",
        "%whos str",
        "%reset -f\n%who",
        "%precision 3\n3.14159265",
        "%pprint\nlist(range(30))",
        "%lsmagic",
        "%alias greet echo hello %s\n%greet you",
        "%load_ext autoreload\n%autoreload 2",
        "%colors NoColor\n%xmode",
        "%matplotlib -l" if False else "%config IPCompleter",
        "%system echo line",
        "%sx echo line two",
        "%%file other.txt\ntext",
        "%pycat other.txt",
        "%timeit -n1 -r1 -q pass",
        "%%bash --bg\necho background",
        "%dirs",
        "!exit 4",
        "print(_exit_code)",
    ],
}  # fmt: skip


def beside(work: Path) -> None:
    """Files that a notebook uses."""
    (work / "data.txt").write_text("data beside the notebook")
    (work / "helper.py").write_text("VALUE = 42\n")
    (work / "script.py").write_text("import sys\nprint(sys.argv, __name__)\n")
    (work / "sub").mkdir()


def both(folder: Path, *sources: str) -> Pair:
    return run_both(folder, notebook_of(*sources), prepare=beside)


@pytest.mark.parametrize("name", SAME)
def test_inside_view(name: str, tmp_path: Path) -> None:
    assert_same(both(tmp_path, *SAME[name]))
