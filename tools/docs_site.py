"""The documentation site: `python -m tools.docs_site` prepares the notebooks in _docs/src and builds _docs/html."""
import ast
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from itertools import groupby
from pathlib import Path

import yaml
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.process import Processor

from tools import apidoc
from tools.notebooks import ROOT, Processors, link_symbols, notebooks

SOURCE, HTML = ROOT/'_docs/src', ROOT/'_docs/html'
PAGES = ['CHANGELOG.md', 'CONTRIBUTING.md', 'benchmarks/RESULTS.md']  # shown beside the notebooks, where they exist
TAGS = {('echo', 'false'): 'remove-input', ('output', 'false'): 'remove-output', ('include', 'false'): 'remove-cell',
        ('warning', 'false'): 'remove-stderr', ('code-fold', ''): 'hide-input', ('code-fold', 'show'): 'hide-input'}


def site_path(path):
    "Where the repository's file `path` lies in the site: nbs/ is its top"
    path = Path(path)
    return path.relative_to('nbs') if path.parts[0] == 'nbs' else path


def relink(text, page):
    "Links to files of the repository, relative to `page`, become links of the site; what they lead to is copied there"
    here = (ROOT/page).parent

    def fix(m):
        target, anchor = m[2], m[3] or ''
        file = (here/target).resolve()
        if re.match(r'\w+:', target) or not file.is_file() or ROOT not in file.parents: return m[0]
        to = site_path(file.relative_to(ROOT))
        if file.suffix != '.ipynb' and to.as_posix() not in PAGES:
            (SOURCE/to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, SOURCE/to)
        return f'{m[1]}({os.path.relpath(to, site_path(page).parent)}{anchor})'
    return re.sub(r'(\[[^\]]*\])\(([^)#\s]+)(#[^)\s]*)?\)', fix, text)


def prose(text, page):
    "Markdown as the site wants it: links to its own pages, and to symbols"
    return relink(link_symbols(text, lambda shown, full, nb: f'{{py:obj}}`{shown[1:-1]} <{full}>`'), page)


def tag(cell):
    "nbdev's and Quarto's cell options, as the tags that MyST-NB knows"
    if tags := [TAGS[item] for item in cell.directives_.items() if item in TAGS]: cell.metadata['tags'] = tags


class Symbols(Processor):
    "Replaces each `show_doc` cell by what it documents, and adds exported variables; `found_` collects name and summary"
    call = re.compile(r'^show_doc\((\S+?)[,)]', re.MULTILINE)

    def begin(self):
        exp = next((c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in c.directives_), None)
        self.module = exp and import_module(f'fasterai_lib.{exp}')
        self.prose = partial(prose, page=Path(self.nb.path_).relative_to(ROOT))
        self.nb.found_ = []
        self.nb.cells = [c for auto, run in groupby(self.nb.cells, lambda c: bool(c.get('has_sd')))
                         for c in (reversed(list(run)) if auto else run)]  # nbdev adds them last one first
        self.names = {m[1] for c in self.nb.cells if c.cell_type == 'code' and (m := self.call.search(c.source))}

    def cell(self, cell):
        if cell.cell_type != 'code': return
        if m := self.call.search(cell.source):
            obj = eval(m[1], vars(self.module))
            cell.cell_type, cell.source = 'markdown', apidoc.render(m[1], obj, self.module.__name__, self.prose, self.names)
            self.nb.found_.append((m[1], apidoc.summary(obj)))
        elif 'export' in cell.directives_ and (comments := self.variables(cell)):
            cell.cell_type, cell.directives_ = 'markdown', {}
            cell.source = apidoc.variables(list(comments), self.module.__name__, self.prose, comments)
            self.nb.found_ += comments.items()

    def variables(self, cell):
        "The exported variables that `cell` assigns, and the comment at the end of the line"
        stored = [n.id for node in cell.parsed_() or [] if isinstance(node, (ast.Assign, ast.AnnAssign)) for n in ast.walk(node)
                  if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in self.module.__all__ and n.id not in self.names]
        comment = {name: re.search(rf'^{name}\b.*?[^\s#]\s+# *(.+)$', cell.source, re.MULTILINE) for name in stored}
        return {name: m[1].strip() if m else '' for name, m in comment.items()}


def prepare(path):
    "Write the page of one notebook; gives the symbols on it"
    page = path.relative_to(ROOT)
    nb = Processors(tag, show_docs=Symbols)(read_nb(path))
    for cell in nb.cells:
        if cell.cell_type != 'markdown': continue
        cell.source = prose(cell.source, page)
        for key in ['outputs', 'execution_count', 'has_sd']: cell.pop(key, None)  # left from a `show_doc` cell
    if path.name == 'index.ipynb' and path.parent == ROOT: nb.cells.append(mk_cell(contents(), 'markdown'))
    out = SOURCE/site_path(page)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, out)
    return nb.found_


def folders():
    "For each folder of nbs/ its caption and pages, as docs/toc.yml orders them"
    for folder, toc in yaml.safe_load((ROOT/'docs/toc.yml').read_text()).items():
        place = {stem: i for i, stem in enumerate(toc['pages'])}
        paths = [p for p in notebooks() if p.parent == ROOT/'nbs'/folder]
        yield toc['caption'], sorted(paths, key=lambda p: (place.get(p.stem, len(place)), p.stem))


def contents():
    "The sidebar: one list of pages per folder"
    def toctree(caption, entries): return f'```{{toctree}}\n:caption: {caption}\n:hidden:\n\n' + '\n'.join(entries) + '\n```\n'
    trees = [(caption, [p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in paths]) for caption, paths in folders() if paths]
    other = [Path(p).with_suffix('').as_posix() for p in PAGES if (ROOT/p).exists()]
    return '\n'.join(toctree(*t) for t in [*trees, ('Reference', ['All symbols <api>', 'Index <genindex>', *other])])


def api_page(found):
    "A page that lists every symbol, by module; `found` has those of each notebook"
    out = ['# All symbols', 'What the library exports, module by module. The [index](genindex) has the methods too.']
    for path in (p for _, paths in folders() for p in paths if found[p]):
        page = site_path(path.relative_to(ROOT)).with_suffix('')
        rows = [f'| `{name}` | {line.replace("|", chr(92) + "|")} |' for name, line in found[path]]
        out.append(f'## [{".".join(page.parts)}]({page.as_posix()}.ipynb)\n\n'
                   + prose('\n'.join(['| Symbol | What it is |', '|---|---|', *rows]), Path('nbs/api.md')))
    return '\n\n'.join(out) + '\n'


def build():
    "Prepare the sources and run Sphinx; a warning is an error"
    shutil.rmtree(SOURCE.parent, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    found = {path: prepare(path) for path in notebooks()}
    (SOURCE/'api.md').write_text(api_page(found))
    for page in PAGES:
        if (ROOT/page).exists():
            (SOURCE/page).parent.mkdir(exist_ok=True)
            (SOURCE/page).write_text(prose((ROOT/page).read_text(), Path(page)))
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-c', ROOT/'docs', '-d', ROOT/'_docs/doctrees', SOURCE, HTML]
    status = subprocess.run([str(c) for c in command], cwd=ROOT).returncode
    if status: shutil.rmtree(HTML, ignore_errors=True)  # so that nobody takes it for a good one
    return status


if __name__ == '__main__': sys.exit(build())
