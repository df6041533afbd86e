"""Run programs, one process each, and put what they print into RESULTS.md: a section that was measured again replaces the one of the
same heading, new ones come at the end, everything else stays as it is."""
import argparse, subprocess, sys
from pathlib import Path
from common import SHORT, machine, note

HERE = Path(__file__).resolve().parent
DEFAULT = ['oneshot', 'memory', 'fit', 'accuracy']
PROGRAMS = {**{name: [] for name in DEFAULT}, 'prune_accuracy': [], 'latency': [], 'budget': [], 'coverage': ['--quick']}  # with their arguments; the last four take up to hours


def sections(text):
    "[[heading or '', text]]: what stands before the first '## ', then every section with its heading's line; joined they are `text`"
    parts = [['', '']]
    for line in text.splitlines(keepends=True):
        if line.startswith('## '): parts.append([line.strip(), ''])
        parts[-1][1] += line
    return parts


def merged(old, new):
    "`old` with the sections of `new` in the place of those of the same heading, or at its end"
    (_, before), *fresh = sections(new)
    if not fresh: raise ValueError(f"no '## ' heading in what was printed: {new[:100]!r}")
    if any(line.startswith('# ') for line in new.splitlines()): raise ValueError("a '# ' heading in what was printed: there is one in the file")
    if before.strip(): fresh[0][1] = f'{fresh[0][1].strip()}\n\n{before.strip()}'  # notes on what was left out, printed before the heading
    parts = sections(old or '# Benchmark results\n')
    for heading, text in fresh:
        at = [i for i, part in enumerate(parts) if part[0] == heading]
        if at: parts[at[0]][1] = text
        else: parts.append([heading, text])
    return '\n\n'.join(text.strip() for _, text in parts if text.strip()) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='small variants: to see that the programs work, not to quote; printed, and written only where --out says')
    parser.add_argument('--only', nargs='*', default=DEFAULT, choices=PROGRAMS)
    parser.add_argument('--out', type=Path, help='default: RESULTS.md')
    args = parser.parse_args()
    out, failed = args.out or (None if args.quick else HERE/'RESULTS.md'), []
    for name in args.only:
        note(f'--- {name}')
        flags = [*PROGRAMS[name], *['--quick']*(args.quick and '--quick' not in PROGRAMS[name])]
        result = subprocess.run([sys.executable, HERE/f'{name}.py', *flags], stdout=subprocess.PIPE, text=True)
        if result.returncode: failed.append(name)
        if result.returncode not in (0, SHORT): continue  # what the file had stays
        text = result.stdout.rstrip() + f'\n\nWritten by `benchmarks/run.py{" --quick" if args.quick else ""} --only {name}`.\n'
        if '| load when started |' not in text: text += f'\n{machine()}'
        print(text, flush=True)
        if out: out.write_text(merged(out.read_text() if out.exists() else '', text))  # after each: an interrupted run leaves what it had
    if failed: sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__': main()
