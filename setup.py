"""Everything that describes the package comes from settings.ini; the version from fasterai_lib/__init__.py."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
version = re.search(r'__version__\s*=\s*"([^"]+)"', (here/'fasterai_lib/__init__.py').read_text())[1]
readme = here/'README.md'
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable']

setup(
    name=cfg['lib_name'],
    version=version,
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license={'apache2': 'Apache-2.0'}[cfg['license']],
    keywords=cfg['keywords'].split(),
    classifiers=[f"Development Status :: {statuses[int(cfg['status']) - 1]}", 'Intended Audience :: Developers',
                 'Programming Language :: Python :: 3'],
    packages=find_packages(include=['fasterai_lib*']),
    package_data={'fasterai_lib': ['*.json']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'bench': cfg['bench_requirements'].split()},
    entry_points={'nbdev': [f"{cfg['lib_name']} = {cfg['lib_name']}._modidx:d"],
                  'console_scripts': [f"{cfg['lib_name']} = {cfg['lib_name']}.cli:main"]},
)
