"""Displays, results, widgets and errors are what nbclient would have kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.compare import assert_same, notebook_of, run_both

PNG = (
    "import base64\nfrom IPython.display import *\npng = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlE"
    "QVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==')"
)

SAME: dict[str, list[str]] = {
    "rich": [
        PNG,
        "display(HTML('<b>bold</b> &amp; <script>1</script>'))",
        "Image(png)",
        "display(Image(png, width=10, height=20, metadata={'alt': 'a dot'}))",
        "Latex(r'$\\frac{1}{2}$')",
        "Math(r'\\int_0^1')",
        "Markdown('# title\\n\\n*text* 😀')",
        "JSON({'a': [1, 2, {'b': None}], 'ü': 1.5}, expanded=True)",
        "GeoJSON({'type': 'Point', 'coordinates': [1, 2]})",
        "SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"><circle r=\"1\"/></svg>')",
        "Javascript('console.log(1)')",
        "Code('x = 1', language='python')",
        "Audio([0, 1, 0, -1], rate=8000)",
        "IFrame('about:blank', 10, 10)",
        "FileLink('no-such-file')",
        "ProgressBar(3)",
        "display({'text/plain': 'raw', 'application/x-custom+json': {'k': [1, 2]}, 'application/pdf': 'JVBERg=='}, raw=True)",
        "display(1, 'two', [3], None)\n'and a result'",
        "publish_display_data({'text/plain': 'published'}, metadata={'m': 1})",
        "display(*(HTML(f'<i>{n}</i>') for n in range(300)))",
        "display()",
        "for n in range(3):\n    print('before', n)\n    display(n)\n    print('after', n)",
    ],
    "display-id": [
        "from IPython.display import *\nhandle = display('first', display_id='here')",
        "update_display('changed from the next cell', display_id='here')",
        "display('again', display_id='here')\ndisplay('other', display_id='there')",
        "for n in range(5):\n    handle.update(HTML(f'<b>{n}</b>'))",
        "update_display('never shown', display_id='nowhere')",
        "print('text')\nupdate_display(Markdown('**last**'), display_id='there')\nprint('more text')",
        "display('twice', display_id='here')\ndisplay('twice', display_id='here')",
        "handle.display('shown by its handle')",
    ],
    "clear-output": [
        "from IPython.display import *\nprint('gone')\nclear_output()\nprint('stays')",
        "print('gone')\nclear_output(wait=True)\nprint('stays')",
        "print('stays, since nothing follows')\nclear_output(wait=True)",
        "print('gone')\nclear_output()",
        "for n in range(10):\n    clear_output(wait=True)\n    display(n)\n    print('step', n)",
        "display('x', display_id='cleared')\nclear_output()\nupdate_display('y', display_id='cleared')",
        "for n in range(5):\n    print(n)\n    clear_output(wait=n % 2 == 0)",
        "import sys\nprint('error stream', file=sys.stderr)\nclear_output()\nprint('after', file=sys.stderr)",
        "clear_output(wait=True)\nclear_output(wait=True)\n'a result'",
        "print('a')\nclear_output(wait=True)\nprint('', end='')",
    ],
    "results": [
        "1 + 1", "None", "'text'", "b'bytes'", "1.5, 1e300, float('nan'), -0.0, 2 ** 200", "3 + 4j", "{'b': 1, 'a': {2, 3}}",
        "list(range(2000))", "{n: str(n) * 20 for n in range(50)}", "[['nested', ['lists']] * 3] * 4", "object()", "print", "int",
        "(n for n in [])", "lambda x: x", "...", "range(10)", "type('T', (), {'__repr__': lambda self: 'own repr'})()",
        "type('T', (), {'_repr_html_': lambda self: '<p>html</p>', '__repr__': lambda self: 'plain'})()",
        "type('T', (), {'_repr_mimebundle_': lambda self, **kw: ({'text/plain': 'p', 'x/y': 'y'}, {'x/y': {'m': 1}})})()",
        "type('T', (), {'_repr_png_': lambda self: b'\\x89PNG', '_repr_json_': lambda self: {'a': 1}})()",
        "1;", "x = 5", "x", "_ + 1, __, ___", "_1, Out[1], In[1], _i1", "import numpy\nnumpy.arange(12).reshape(3, 4)",
        "numpy.random.default_rng(0).random((200, 200))", "numpy.float64(1.5), numpy.zeros(3, 'i1')", "Exception('as a value')",
        "import re, pathlib, datetime, decimal, fractions, collections\nre.compile('a+')", "pathlib.Path('a/b'), datetime.date(2020, 1, 2)",
        "collections.Counter('hello'), collections.OrderedDict(a=1), collections.deque([1], 3)", "1\n2\n3", "if True:\n    42",
        "from IPython.core.interactiveshell import InteractiveShell\nInteractiveShell.ast_node_interactivity = 'all'\n1\n'two'",
        "1\nfor n in [7, 8]:\n    n\n[9]", "InteractiveShell.ast_node_interactivity = 'last_expr_or_assign'\ny = 12",
    ],  # fmt: skip
    "pandas": [
        "import pandas as pd, numpy as np\ndf = pd.DataFrame({'a': range(5), 'b': list('vwxyz'), 'c': np.linspace(0, 1, 5)})\ndf",
        "df.describe()",
        "df.info()",
        "df['a']",
        "df.groupby('b').sum()",
        "pd.DataFrame(np.arange(2000).reshape(100, 20))",
        "df.set_index(['a', 'b']).T",
        "display(df.head(2), df.tail(1))",
        "print(df)",
        "df[df.a > 99]",
        "pd.concat([df, df]).reset_index().merge(df, on='a')",
    ],
    "raises-exception": [
        "1 / 0", "print('goes on')", "raise SystemExit(3)", "import sys\nsys.exit('bye')", "def f(n):\n    return f(n - 1) if n else [][1]\nf(3)",
        "print('still here')", "raise KeyboardInterrupt", "print('after the interrupt')", "x ===", "  unindented\nbad", "undefined_name",
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('second') from error", "assert False, 'a message'",
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10 ** 8):\n    pass", "raise type('Own', (Exception,), {})('text')",
        "raise ExceptionGroup('group', [ValueError(1), TypeError('two')])", "import json\njson.loads('{')",
        "import asyncio\nasync def boom():\n    await asyncio.sleep(0)\n    raise OSError(2, 'no file')\nawait boom()", "%no_such_magic",
        "%%bash\nexit 3", "eval('1 +')", "exec(compile('raise IndexError', 'named.py', 'exec'))", "raise StopIteration", "int('x' * 10_000)",
        "from IPython.core.error import UsageError\nraise UsageError('plain')", "print('some text')\n{}['key']", "with open('no-file'):\n    pass",
        "import concurrent.futures\nconcurrent.futures.ThreadPoolExecutor().submit(lambda: 1 / 0).result()", "import numpy\nnumpy.zeros(3) @ numpy.zeros(4)",
        "error = ValueError('noted')\nerror.add_note('a note')\nraise error",
        "raise BaseException('base')", "raise GeneratorExit", "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()",
        "%xmode Plain\n1 / 0", "%xmode Minimal\n1 / 0", "%xmode Verbose\nvalue = 3\nvalue / 0", "%xmode Context\ndel value\nvalue",
        "import warnings\nwarnings.simplefilter('error')\nwarnings.warn('as an error')", "input('never asked')", "import getpass\ngetpass.getpass()",
        "import sys\nsys.stdin.read()", "raise MemoryError('pretended')", "breakpoint()",
    ],  # fmt: skip
    "widgets": [
        "import ipywidgets as w\nslider = w.IntSlider(value=3, description='n')\nslider",
        "slider.value = 7\ndisplay(w.HTML('<b>x</b>'), w.Text('text'))",
        "out = w.Output()\nout",
        "with out:\n    print('into the widget')\n    display('and this')\nprint('into the cell')",
        "with out:\n    import sys\n    print('error text', file=sys.stderr)\n    from IPython.display import HTML\n    display(HTML('<i>i</i>'))",
        "out.clear_output()\nwith out:\n    print('only this')",
        "out.append_stdout('appended')\nout.append_display_data(HTML('<u>u</u>'))",
        "with out:\n    1 / 0",
        "@out.capture(clear_output=True)\ndef shown():\n    print('captured')\nshown()",
        "def square(n):\n    print(n * n)\nw.interact(square, n=5);",
        "box = w.VBox([slider, w.Button(description='press')])\nbox",
        "other = w.Output()\nwith other:\n    for n in range(3):\n        other.clear_output(wait=True)\n        print(n)\nother.outputs",
        "bar = w.IntProgress(max=10)\ndisplay(bar)\nfor n in range(11):\n    bar.value = n",
        "inner, outer = w.Output(), w.Output()\nwith outer:\n    print('outer')\n    with inner:\n        print('inner')\n    display(inner)\nouter",
        "link = w.jslink((slider, 'value'), (bar, 'value'))\nslider.close()",
    ],
    "comms": [
        "from comm import create_comm\nc = create_comm(target_name='a-target', data={'x': 1})\nprint(c.target_name)",
        "c.send({'y': [1, 2]})\nc.send(data={'z': 'ü'}, metadata={'m': 1}, buffers=[b'raw'])",
        "c.close()\nprint('closed')",
        "get_ipython().kernel.comm_manager.register_target('mine', lambda comm, msg: None)",
    ],
}  # fmt: skip

RAISING = {"raises-exception", "widgets"}


@pytest.mark.parametrize("name", SAME)
def test_displays(name: str, tmp_path: Path) -> None:
    sources = SAME[name]
    tags = {n: ["raises-exception"] for n in range(len(sources))} if name in RAISING else None
    assert_same(run_both(tmp_path, notebook_of(*sources, tags=tags)))


def test_allow_errors_as_an_option_lets_all_cells_run(tmp_path: Path) -> None:
    assert_same(run_both(tmp_path, notebook_of("1 / 0", "print('second')", "[][0]", "'last'"), allow_errors=True))


def test_cells_of_every_kind(tmp_path: Path) -> None:
    document = notebook_of(
        "print('runs')",
        "",
        "   \n\t\n",
        "# only a comment",
        "# a comment\n\n# and another\n",
        "'''only a string'''",
        "pass",
        "print('skipped')",
        "raise ValueError('skipped as well')",
        ";",
        "_ih, len(Out)",
        tags={7: ["skip-execution"], 8: ["skip-execution", "raises-exception"], 0: ["any", "parameters"]},
        custom={"kept": [1, {"deep": True}]},
        title="Näme",
    )
    import nbformat

    picture = {"dot.png": {"image/png": "iVBORw0KGgo="}}
    document.cells.insert(1, nbformat.v4.new_markdown_cell("# Title\n![dot](attachment:dot.png)", attachments=picture, id="m1"))
    document.cells.insert(3, nbformat.v4.new_raw_cell("raw *text*", metadata={"format": "text/x-rst"}, id="r1"))
    document.cells[0].metadata.update({"collapsed": True, "jupyter": {"source_hidden": True}, "own": {"a": 1}, "name": "cell name"})
    document.cells[9].outputs = [nbformat.v4.new_output("stream", text="output from an earlier run of a skipped cell")]
    document.cells[9].execution_count = 41
    document.cells[2].outputs = [nbformat.v4.new_output("stream", text="stale output of an empty cell")]
    document.cells[2].execution_count = 42
    document.cells[0].outputs = [nbformat.v4.new_output("stream", text="stale"), nbformat.v4.new_output("display_data", {})]
    document.cells[0].execution_count = 43

    pair = run_both(tmp_path, document)

    assert_same(pair)
    kept = [(cell.cell_type, cell.source, cell.get("attachments")) for cell in pair.ours.cells]
    assert kept == [(cell.cell_type, cell.source, cell.get("attachments")) for cell in document.cells]
