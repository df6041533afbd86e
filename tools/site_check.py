"""Looks at a built site as a reader's browser shows it: pages opened in headless Chromium, then every link, image and text."""
import base64
import json
import re
import shutil
import subprocess
import tempfile
from collections import namedtuple
from html import escape
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

from bs4 import BeautifulSoup

Page = namedtuple('Page', 'html broken_images', defaults=[()])

BROWSER = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None)
_flags = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
          '--disable-component-update --disable-sync --allow-file-access-from-files --virtual-time-budget=15000 --dump-dom')
# One frame per page; when all have loaded, and had time for their scripts, the document becomes what they look like.
_harness = '''<!doctype html><meta charset="utf-8"><body>{frames}<script>
const look = frame => {{
  const doc = frame.contentDocument
  return {{html: doc.documentElement.outerHTML, broken: [...doc.images].filter(i => !i.naturalWidth).map(i => i.getAttribute('src'))}}
}}
onload = () => setTimeout(() => {{
  const seen = JSON.stringify([...document.querySelectorAll('iframe')].map(look))
  document.body.replaceChildren(Object.assign(document.createElement('pre'), {{textContent: seen}}))
}}, 3000)</script>'''
_unrendered = {
    'formula': r'\$|\\[(\[a-zA-Z]',
    'emphasis': r'\*\*',
    'link': r'\[[^\]\n]+\]\([^)\n]*\)',
    'directive or role': r':::|\{[a-z]+(?::[a-z]+)?\}|\[!(?:NOTE|TIP|IMPORTANT|WARNING|CAUTION)\]',
    'code': r'`',
    'table': r'\|\s*-{3}',
    'heading': r'(?m)^#{1,6} \S',
}


def html_files(site): return sorted(p for p in site.rglob('*.html') if not p.relative_to(site).parts[0].startswith('_'))


def render(urls, batch=16):
    "Each of `urls`, opened in Chromium, as a `Page`"
    pages = []
    for i in range(0, len(urls), batch):
        frames = ''.join(f'<iframe width="1400" height="900" src="{escape(url)}"></iframe>' for url in urls[i:i + batch])
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
            start = Path(tmp)/'harness.html'
            start.write_text(_harness.format(frames=frames))
            run = subprocess.run([BROWSER, *_flags.split(), f'--user-data-dir={tmp}/profile', start.as_uri()],
                                 capture_output=True, encoding='utf-8', errors='replace', timeout=180)
        pre = BeautifulSoup(run.stdout, 'html.parser').find('pre')
        if pre is None: raise RuntimeError(f'Chromium gave no pages (exit status {run.returncode}):\n{run.stderr[-2000:]}')
        pages += [Page(seen['html'], seen['broken']) for seen in json.loads(pre.get_text())]
    return pages


class Site:
    "The pages of the folder `root`, as `path: Page`"
    def __init__(self, root, pages):
        self.root, self.pages = root.resolve(), {path.resolve(): page for path, page in pages.items()}
        self.soups = {path: BeautifulSoup(page.html, 'html.parser') for path, page in self.pages.items()}
        self.anchors = {path: {tag.get('id') or tag.get('name') for tag in soup.find_all(lambda t: t.get('id') or t.get('name'))}
                        for path, soup in self.soups.items()}

    def target(self, path, url): return (path.parent/unquote(urlparse(url).path)).resolve() if urlparse(url).path else path

    def link(self, path, url):
        "What is wrong with a link on `path`, or None"
        parts = urlparse(url)
        if parts.scheme in ('http', 'https'): return None if re.fullmatch(r'[\w.-]+\.\w+(:\d+)?', parts.netloc) and ' ' not in url else 'malformed'
        if parts.scheme == 'mailto': return None
        if parts.scheme or parts.netloc: return 'neither of this site nor https'
        file, anchor = self.target(path, url), unquote(urldefrag(url).fragment)
        if self.root not in file.parents: return 'outside the site'
        if not file.is_file() and file not in self.pages: return 'leads nowhere'
        if anchor and file in self.anchors and anchor not in self.anchors[file]: return 'no such anchor'

    def resource(self, path, url):
        "What is wrong with an image, script or style sheet on `path`, or None"
        if url.startswith('data:'):
            head, _, data = url.partition(',')
            try: ok = base64.b64decode(data, validate=True) if head.endswith(';base64') else data
            except ValueError: ok = False
            return None if ok else 'does not decode'
        if urlparse(url).scheme or urlparse(url).netloc: return 'from another site'
        file = self.target(path, url)
        return None if file.is_file() and file.stat().st_size else 'missing or empty'

    def on_page(self, path):
        "Every problem on one page"
        soup = self.soups[path]
        for a in soup.find_all('a', href=True):
            if why := self.link(path, a['href']): yield f'link {a["href"]}: {why}'
        for tag in soup.find_all(['img', 'script', 'iframe', 'source'], src=True) + soup.select('link[href]:not([rel~=canonical])'):
            is_page = {'search', 'index', 'next', 'prev', 'author', 'help'} & set(tag.get('rel', []))
            url = tag.get('src') or tag['href']
            if why := (self.link if is_page else self.resource)(path, url): yield f'{tag.name} {url[:80]}: {why}'
        for url in self.pages[path].broken_images: yield f'img {url[:80]}: the browser cannot show it'
        if len(soup.find_all('h1')) != 1 and path.name != 'search.html': yield f'{len(soup.find_all("h1"))} main headings'
        if soup.select('.system-message, .problematic'): yield 'an error of Sphinx in the page'
        for math in soup.find_all('math'):
            if '\\' in math.get_text(): yield f'unrendered formula: {" ".join(math.get_text().split())}'
        body = BeautifulSoup(str(soup.select_one('article, [role=main], main') or soup.body), 'html.parser')
        for tag in body.select('script, style, pre, code, math, svg, dt.sig'): tag.decompose()
        for what, pattern in _unrendered.items():
            if m := re.search(pattern, body.get_text()): yield f'unrendered {what}: {m.string[max(0, m.start() - 30):m.end() + 30]!r}'

    def unreachable(self):
        "Pages to which no path of links leads from the home page"
        todo, seen = [self.root/'index.html'], set()
        while todo:
            path = todo.pop()
            if path in seen or path not in self.soups: continue
            seen.add(path)
            todo += [self.target(path, a['href']) for a in self.soups[path].find_all('a', href=True) if not urlparse(a['href']).scheme]
        return [p for p in self.pages if p not in seen and p.name != 'search.html']  # the search box leads there

    def problems(self):
        "One line per problem of the site"
        out = [f'{path.relative_to(self.root)}: {problem}' for path in self.pages for problem in self.on_page(path)]
        out += [f'{path.relative_to(self.root)}: no link leads here' for path in self.unreachable()]
        for css in self.root.rglob('*.css'):
            if m := re.search(r'(?:@import|url\()\s*["\']?(?:https?:)?//[^)"\';]*', css.read_text()): out.append(f'{css.name}: from another site: {m[0]}')
        return out
