"""What README.md, the site and the sync check share: where the notebooks are, and nbdev's processors."""
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
        for full, (page, _) in syms.items():
            name = full.removeprefix(f'{mod}.')
            if not name.startswith('_') and '._' not in name:
                found.setdefault(name, (full, 'nbs/' + page.partition('#')[0].replace('.html', '.ipynb')))
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
        procs = [p for p in super().base_procs() if p not in self.skip]
        return [self.show_docs if p is exec_show_docs else p for p in procs if p is not exec_show_docs or self.show_docs] + list(self.extra)

    def nb_proc(self, nb): return NBProcessor(nb=nb, procs=self.procs(), rm_directives=True)

    def __call__(self, nb):
        "Process `nb`, and give it back"
        super().__call__(nb)
        return nb
