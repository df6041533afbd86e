"""What README.md, the site and the sync check share: where the notebooks are, and nbdev's processors."""
import ast
import re
import sys
from pathlib import Path

from nbdev.process import NBProcessor
from nbdev.processors import (FilterDefaults, FrontmatterProc, add_fold, add_links, clean_show_doc, exec_show_docs,
                              insert_warning)

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] != str(ROOT): sys.path.insert(0, str(ROOT))  # document this tree, not an installed one

_backticks = re.compile(r'(?<!\[)`([^`\s]+?)(?:\(\))?`(?!\])')


def notebooks(root=ROOT):
    "The home page, then every notebook under nbs/, in a fixed order"
    nbs = sorted(p for p in (root/'nbs').rglob('*.ipynb')
                 if not any(part[0] in '._' for part in p.relative_to(root).parts))
    return [p for p in [root/'index.ipynb'] if p.exists()] + nbs


def symbols():
    "Every public symbol, as `name: (full name, notebook)`"
    try: from fasterai_lib._modidx import d
    except ImportError: return {}
    found = {}
    for mod, syms in d['syms'].items():
        page = next(iter(syms.values()))[0].partition('#')[0]
        exported = re.search(r'^__all__ = (\[.*?\])', (ROOT/f'{mod.replace(".", "/")}.py').read_text(encoding='utf-8'), re.M | re.S)
        for name in [full.removeprefix(f'{mod}.') for full in syms] + (ast.literal_eval(exported[1]) if exported else []):
            if not name.startswith('_') and '._' not in name:
                found.setdefault(name, (f'{mod}.{name}', f'nbs/{page.replace(".html", ".ipynb")}'))
    return found


def link_symbols(text, link):
    "Replace each `` `Symbol` `` in the prose of `text` by `link(shown, full name, notebook)`"
    known, fenced, lines = symbols(), False, []
    for line in text.split('\n'):
        if line.lstrip().startswith('```'): fenced = not fenced
        elif not fenced and not line.startswith(('#', '    ')):
            line = _backticks.sub(lambda m: link(m[0], *known[m[1]]) if m[1] in known else m[0], line)
        lines.append(line)
    return '\n'.join(lines)


class Processors(FilterDefaults):
    "nbdev's processors, less those written for Quarto, then `extra`; `instead` replaces one by another"
    skip = {FrontmatterProc, insert_warning, add_links, add_fold, clean_show_doc}

    def __init__(self, *extra, show_docs=None): self.extra, self.show_docs = extra, show_docs

    def base_procs(self):
        procs = [p for p in super().base_procs() if p not in self.skip] + list(self.extra)
        return [self.show_docs or p if p is exec_show_docs else p for p in procs]

    def nb_proc(self, nb): return NBProcessor(nb=nb, procs=self.procs(), rm_directives=True)

    def __call__(self, nb):
        "Process `nb`, and give it back"
        super().__call__(nb)
        return nb
