"""What the site says about one symbol: MyST directives of Sphinx's Python domain, so that it enters contents, index and search."""
import inspect
import re

from fastcore.docments import DocmentTbl, DocmentText, empty


def _code(value):
    "An annotation or default as code"
    text = getattr(value, '__name__', None) if inspect.isclass(value) or inspect.isroutine(value) else None
    text = text or (inspect.formatannotation(value) if not isinstance(value, str) else value)
    text = re.sub(r' at 0x[0-9a-f]+', '', text).replace('`', "'").replace('\n', ' ')
    return f'`{text}`' if text else ''


class ParamTable(DocmentTbl):
    "fastcore's table of parameters, with names, types and defaults as code"
    @property
    def params_str(self):
        "All but a `*args` or `**kwargs` of which nothing is said; two backticks: a name here is no link"
        var = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        said = [name for name in self.params if self.dm[name].kind not in var or self.dm[name].docment is not empty]
        return '\n'.join(self._row(f'`` {name} ``', self.dm[name]) for name in said)

    @property
    def return_str(self): return self._row('**Returns**', self.dm['return'])

    def _row(self, name, param):
        cells = [name]
        for column in self._columns:
            value = param.get(column, empty)
            if value is empty: cells.append('')
            elif column == 'docment': cells.append(value.replace('\n', '<br>'))
            else: cells.append(_code(repr(value) if column == 'default' and isinstance(value, str) else value))
        return '| ' + ' | '.join(re.sub(r'(?<!\\)\|', r'\|', cell) for cell in cells) + ' |'


def _docments(kind, obj, **kwargs):
    "fastcore's `kind` of documentation, without the types that it infers from defaults; None for what has no signature"
    try: doc, params = kind(obj, **kwargs), inspect.signature(obj).parameters
    except (TypeError, ValueError): return None
    for name, param in params.items():
        if name in doc.dm and param.annotation is empty: doc.dm[name]['anno'] = empty
    return doc


def _signature(obj):
    if not (doc := _docments(DocmentText, obj, docstring=False)): return ''
    returns = doc.dm.get('return', {}).get('anno', empty)
    arrow = '' if returns is empty or inspect.isclass(obj) else f' -> {_code(returns)[1:-1] or None}'
    params = ', '.join(re.sub(r'<[^<>]*>', '...', text.replace('\n', ' ')) for text, _ in doc.params)  # `<lambda>`
    return f'({params}){arrow}'


def summary(obj):
    "The first line of the docstring of `obj` itself, not of its class"
    own = inspect.isclass(obj) or inspect.isroutine(obj) or isinstance(obj, property)
    doc = (obj.__doc__ if own else vars(obj).get('__doc__') if hasattr(obj, '__dict__') else None) or ''
    return doc.strip().partition('\n')[0]


def _methods(cls, documented):
    "Public methods and properties with a docstring, defined in the body of `cls` and not documented on their own"
    for name, member in vars(cls).items():
        raw = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        if name.startswith('_') or f'{cls.__name__}.{name}' in documented or not getattr(raw, '__doc__', None): continue
        if isinstance(raw, property) or inspect.isfunction(raw) and raw.__module__ == cls.__module__: yield name, raw


def _directive(kind, head, module, *body):
    "A directive, fenced by more backticks than anything in its body"
    body = '\n\n'.join(part for part in body if part)
    fence = '`' * max([3, *(len(ticks) + 1 for ticks in re.findall('`{3,}', body))])
    return f'{fence}{{py:{kind}}} {head}\n:module: {module}\n\n{body}\n{fence}'


def render(name, obj, module, prose, documented=()):
    "The documentation of `obj`, known as `name` in `module`; `prose` turns docstrings into MyST, `documented` names have their own entry"
    doc = prose(inspect.cleandoc(obj.__doc__)) if summary(obj) else ''
    if isinstance(obj, property): return _directive('property', name, module, doc)
    if not (inspect.isclass(obj) or inspect.isroutine(obj)): return _directive('data', name, module, doc)
    kind = 'class' if inspect.isclass(obj) else 'method' if '.' in name else 'function'
    members = [render(f'{name}.{n}', m, module, prose) for n, m in _methods(obj, documented)] if kind == 'class' else []
    return _directive(kind, name + _signature(obj), module, doc, prose(str(_docments(ParamTable, obj) or '')), *members)


def variables(names, module, prose, comments):
    "The documentation of exported variables: those with a comment one by one, the others in one block"
    plain = [name for name in names if not comments.get(name)]
    block = '```{eval-rst}\n.. py:data:: ' + '\n             '.join(plain) + f'\n   :module: {module}\n   :no-contents-entry:\n```'
    return '\n\n'.join([block]*bool(plain) + [_directive('data', n, module, prose(comments[n])) for n in names if comments.get(n)])
