"""The built site, as a browser shows it. Where `make docs` has not built it, it is built here."""
import json

import pytest

from tools import docs_site, site_check
from tools.notebooks import symbols
from tools.site_check import Page, Site, html_files, render

needs_browser = pytest.mark.skipif(site_check.BROWSER is None, reason='no Chromium on this machine')


@pytest.fixture(scope='session')
def html():
    if not (docs_site.HTML/'index.html').exists(): assert docs_site.build() == 0, 'Sphinx says why in the captured stderr'
    return docs_site.HTML


@needs_browser
def test_every_page_link_and_image(html):
    files = html_files(html)
    problems = Site(html, dict(zip(files, render([f.as_uri() for f in files])))).problems()
    assert not problems, '\n'.join(problems)


@needs_browser
def test_search_finds_a_symbol(html):
    known = symbols()
    name = 'SparsifyCallback' if 'SparsifyCallback' in known else next(iter(known))
    page, = render([(html/'search.html').as_uri() + f'?q={name}'])
    results = site_check.BeautifulSoup(page.html, 'html.parser').select('#search-results li')
    assert any(known[name][0] in li.get_text() for li in results), f'{len(results)} results, none is {known[name][0]}'


def test_search_index_has_every_symbol(html):
    index = json.loads((html/'searchindex.js').read_text().removeprefix('Search.setIndex(').removesuffix(')'))
    indexed = {f'{prefix}.{obj[-1]}' for prefix, objs in index['objects'].items() for obj in objs}
    assert not [full for name, (full, _) in symbols().items() if '.' not in name and full not in indexed]


faults = {
    '<a href="nowhere.html">x</a>': 'leads nowhere',
    '<a href="../../up.html">x</a>': 'outside the site',
    '<a href="#no">x</a>': 'no such anchor',
    '<a href="other.html#no">x</a>': 'no such anchor',
    '<a href="https://nothost">x</a>': 'malformed',
    '<a href="ftp://example.org/x">x</a>': 'neither of this site',
    '<img src="gone.png">': 'missing or empty',
    '<img src="data:image/png;base64,%%">': 'does not decode',
    '<img src="https://example.org/x.png">': 'from another site',
    '<script src="https://example.org/x.js"></script>': 'from another site',
    '<link rel="stylesheet" href="//example.org/x.css">': 'from another site',
    '<p>where $x^2$ is</p>': 'unrendered formula',
    '<p>where $$<math><mi>x</mi></math>$$ is</p>': 'unrendered formula',
    r'<p>where \(x\) is</p>': 'unrendered formula',
    r'<p>where <math><mi>arg\,min</mi></math> is</p>': 'unrendered formula',
    '<p>so **bold**</p>': 'unrendered emphasis',
    '<p>see [this](that.md)</p>': 'unrendered link',
    '<p>::: {.callout}</p>': 'unrendered directive',
    '<p>see {ref}x</p>': 'unrendered directive',
    '<p>[!NOTE] this</p>': 'unrendered directive',
    '<h1>Two</h1>': '2 main headings',
}
good = '''<h1 id="top">One</h1><a href="other.html#there">x</a> <a href="https://example.org/a#b">y</a> <a href="#top">z</a>
<img src="data:image/svg+xml;base64,PHN2Zy8+"><pre>**kwargs $x$</pre><code>[a](b)</code>'''


def synthetic(root, body):
    pages = {'index.html': f'<main>{body}</main>', 'other.html': '<main><h1 id="there">Other</h1></main>'}
    for name, text in pages.items(): (root/name).write_text(text)
    return Site(root, {root/name: Page(text) for name, text in pages.items()})


def test_checker_accepts_a_good_page(tmp_path): assert not synthetic(tmp_path, good).problems()


@pytest.mark.parametrize('fault', faults)
def test_checker_finds(tmp_path, fault):
    problem, = synthetic(tmp_path, good + fault).problems()
    assert problem.startswith('index.html') and faults[fault] in problem


def test_checker_finds_orphans_and_foreign_styles(tmp_path):
    (tmp_path/'a.css').write_text('@import "https://example.org/font.css";')
    assert [p.partition(':')[0] for p in synthetic(tmp_path, '<h1>No links</h1>').problems()] == ['other.html', 'a.css']


@needs_browser
def test_browser_finds_a_broken_image(tmp_path):
    (tmp_path/'a.png').write_bytes(b'not an image')
    (tmp_path/'index.html').write_text('<main><h1>One</h1><img src="a.png"><script>document.title = "run"</script></main>')
    page, = render([(tmp_path/'index.html').as_uri()])
    assert list(page.broken_images) == ['a.png'] and '<title>run</title>' in page.html
