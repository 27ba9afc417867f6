from __future__ import annotations

from pathlib import Path

import pytest

from safe_exec.errors import NotebookError
from safe_exec.notebook import notebook
from safe_exec.notebook.text_formats import file_lines, has_cells

PERCENT = """# %% [markdown]
# # Title
#
# x = 1

# %% tags=["first"]
x = 1
# %matplotlib inline

# %%
# !ls

print(x)
"""
MYST = """# T

```{code-cell} ipython3
:tags: [a]

x = 1
y = 2
```
"""
FENCES = "x = 1\n\n```python\nx = 1\n```\n\n```bash\nls\n```\n"
QUARTO = """---
title: x
jupyter: python3
---

```{python}
#| label: z
x = 1
```
"""
RMD = "---\ntitle: x\n---\n\ntext\n\n```{r}\ny <- 1\n```\n"


@pytest.mark.bed("jupytext")
@pytest.mark.parametrize(
    ("name", "text", "language", "cells"),
    [
        ("a.py", PERCENT, "python",
         [("x = 1\n%matplotlib inline", (7, 8)), ("!ls\n\nprint(x)", (11, 12, 13))]),
        ("a.py", PERCENT.replace("\n", "\r\n"), "python",
         [("x = 1\n%matplotlib inline", (7, 8)), ("!ls\n\nprint(x)", (11, 12, 13))]),
        ("a.R", "# %%\nx <- 1\n", "R", [("x <- 1", (2,))]),
        ("a.md", MYST, "python", [("x = 1\ny = 2", (6, 7))]),
        ("a.md", FENCES, "python", [("x = 1", (4,)), ("%%bash\nls", (7, 8))]),
        ("a.Rmd", RMD, "R", [("y <- 1", (8,))]),
        ("a.qmd", QUARTO, "python", [("#| label: z\nx = 1", (7, 8))]),
    ],
)  # fmt: skip
def test_cells_and_their_lines(
    tmp_path: Path, name: str, text: str, language: str, cells: list[tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    read = notebook.read(path)
    assert read.language == language
    code = [cell for cell in read.node.cells if cell.cell_type == "code"]
    assert [(cell.source, read.file_lines[cell.id]) for cell in code] == cells
    assert [cell.id for cell in notebook.read(path).node.cells] == [c.id for c in read.node.cells]


@pytest.mark.parametrize(
    ("name", "text"), [("a.py", "print(1)\n"), ("a.md", "# T\n\n`x`\n"), ("a.qmd", "---\n---\n")]
)
def test_a_text_without_cells_is_no_notebook(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert not has_cells(path, text.encode())
    with pytest.raises(NotebookError, match=r"without (code )?cells"):
        notebook.read(path)


@pytest.mark.bed("jupytext")
@pytest.mark.parametrize("header", ["a: [", "a: !!python/object/apply:os.system ['true']"])
def test_a_header_that_is_wrong_is_one_line(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.md"
    path.write_text(f"---\njupytext:\n  {header}\n---\n\n```python\n1\n```\n")
    with pytest.raises(NotebookError, match="jupytext cannot read it") as caught:
        notebook.read(path)
    assert "\n" not in str(caught.value)


def test_cells_that_are_not_found_have_no_lines() -> None:
    cells = [{"cell_type": "code", "source": "a"}, {"cell_type": "code", "source": "b\nc"}]
    assert file_lines(b"b\nc\n", cells) == [(), (1, 2)]
