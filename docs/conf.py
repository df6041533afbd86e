"""Sphinx's settings. tools/docs_site.py prepares what it reads; nothing here or there comes from the network."""
import re
from configparser import ConfigParser
from html import escape
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

root = Path(__file__).resolve().parents[1]
_settings = ConfigParser()
_settings.read(root/'settings.ini', encoding='utf-8')

project = _settings['DEFAULT']['lib_name']
author = _settings['DEFAULT']['author']
release = re.search(r'__version__\s*=\s*"([^"]+)"', (root/'fasterai_lib/__init__.py').read_text())[1]
root_doc = 'index'
extensions = ['myst_nb', 'sphinx_copybutton']

myst_enable_extensions = ['alert', 'amsmath', 'colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 4
myst_dmath_double_inline = True
nb_execution_mode = 'off'  # the outputs are those in the notebooks
nb_ipywidgets_js = {}      # by default from a CDN
nb_merge_streams = True
nb_render_markdown_format = 'myst'  # tables and formulas in outputs

add_module_names = False
python_display_short_literal_types = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = 'hide'
modindex_common_prefix = ['fasterai_lib.']

html_theme = 'furo'
html_title = f'{project} {release}'
html_static_path = ['static']
html_css_files = ['custom.css']
html_favicon = html_logo = 'static/logo.svg'
html_copy_source = html_show_sourcelink = html_show_copyright = False
html_theme_options = {
    'top_of_page_buttons': [],
    'light_css_variables': {'color-brand-primary': '#0b6e6e', 'color-brand-content': '#0b6e6e'},
    'dark_css_variables': {'color-brand-primary': '#5fd0c5', 'color-brand-content': '#5fd0c5'},
}
copybutton_exclude = '.linenos, .gp, .go'


def _mathml(self, node):
    "Formulas as MathML: every current browser shows it, without a script"
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div class="math" id="{escape(node["ids"][0])}">{formula}</div>' if block and node['ids'] else formula)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer('mathml', inline_renderers=(_mathml, None), block_renderers=(_mathml, None))


html_math_renderer = 'mathml'
