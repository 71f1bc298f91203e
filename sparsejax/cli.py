"""Defines the command `sparsejax`, which reports on checkpoints, checks, packs and unpacks them, advises and plans.

    sparsejax report CKPT                                  # the sparsity and pattern of each parameter
    sparsejax pack CKPT OUT --pattern 2:4                  # one safetensors file without the zeros
    sparsejax advise CKPT --pattern '128x128 0.9'          # whether packing makes it smaller and faster
    sparsejax prune OUT --model hf:FOLDER --data TEXT.txt  # a pruned model of the same layout

The exit status is 0 if the command succeeded, and 1 if `check` found parameters that do not keep the pattern. The exit
status is 2 if the command could not be carried out; one line on the standard error says why.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparsejax import (
  advice,
  checkpoints,
  errors,
  formats,
  hub,
  huggingface,
  io,
  patterns,
  progress,
  recipes,
  spellings,
  tables,
  trees,
  version,
)
from sparsejax.hub import texts
from sparsejax.types import Pattern

_LONGEST = 8000  # letters of a refusal, which may quote names of another program's file


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit status. Without `argv`, reads the process's arguments and runs on the CPU."""
  if argv is None:
    _own_process()
  try:
    args = _parser().parse_args(argv)
    with jax.enable_x64(True), progress.listening(progress.paced(_line)):  # keeps 64-bit leaves whole
      return args.run(args)
  except SystemExit as e:  # argparse has printed the error, or the help
    return int(e.code or 0)
  except (ValueError, OSError, MemoryError) as e:
    reason = getattr(e, 'strerror', None) or str(e) or type(e).__name__
    named = f'{e.filename}: {reason}' if getattr(e, 'filename', None) else reason
    print('sparsejax:', tables.printable(' '.join(named.split()))[:_LONGEST], file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('sparsejax: interrupted', file=sys.stderr)
    return 130


def _line(text: str) -> None:
  progress.on_standard_error(tables.printable(text))


def _own_process() -> None:
  """Sets what holds for a whole process: the platform, the end by SIGTERM, and who may write to the standard error."""
  if 'JAX_PLATFORMS' not in os.environ:
    jax.config.update('jax_platforms', 'cpu')  # Files need no accelerator, which may be busy training.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # An exit leaves no part of a file.
  logging.getLogger('asyncio').disabled = True  # Threads of Orbax would repeat what the refusal says.


def report(args: argparse.Namespace) -> int:
  """Prints the table of `sparsejax.report`."""
  print(checkpoints.reported(_opened(args), _pattern(args)))
  return 0


def check(args: argparse.Namespace) -> int:
  """Prints one line for each parameter that does not keep the pattern, and returns 1 if there is any."""
  opened = _opened(args)
  checked = checkpoints.reported(opened, _pattern(args))
  for row in checked.violations:
    print(tables.printable(f'{row.path} {"x".join(map(str, row.shape))}: {row.problem}'))
  if not checked.violations:
    print(f'ok: {len(checked.rows)} parameters keep {" ".join(args.pattern)}')
  _print_notes(opened)
  return 1 if checked.violations else 0


def pack(args: argparse.Namespace) -> int:
  """Writes the packed parameters, and prints the bytes before and after."""
  _refuse_to_overwrite(args)
  opened, sizes = _opened(args), []
  packed = checkpoints.packed(opened, _pattern(args, str), lambda *both: sizes.append(both), args.signed_zeros)
  io.save(args.out, packed, metadata=_metadata(args.checkpoint))
  print(_sizes(f'{len(sizes)} packed parameters', *map(sum, zip(*sizes))))
  print(_sizes(f'all of {args.out}', checkpoints.dense_nbytes(opened), os.path.getsize(args.out)))
  _print_notes(opened)
  return 0


def unpack(args: argparse.Namespace) -> int:
  """Writes the dense parameters, bit for bit, and prints the bytes before and after."""
  _refuse_to_overwrite(args)
  tree, before = io.stored(args.file, own=True), os.path.getsize(args.file)
  io.save(args.out, checkpoints.unpacked(tree), metadata=_metadata(args.file))
  print(_sizes(f'all of {args.out}', before, os.path.getsize(args.out)))
  return 0


def advise(args: argparse.Namespace) -> int:
  """Prints the table of `sparsejax.advise`, whose last line says what to do."""
  opened = _opened(args)
  print(advice.advise(opened.params, _pattern(args), device=args.device, tokens=args.tokens, where=opened.where,
                      axes=opened.axes))
  _print_notes(opened)
  return 0


def prune(args: argparse.Namespace) -> int:
  """Writes the folder of the pruned model, prints each matrix as it is pruned, and then the table of the report."""
  if args.recipe not in recipes.POST_TRAINING:
    raise errors.unknown('--recipe', 'recipe', args.recipe, recipes.POST_TRAINING)
  if needs := spellings.required(recipes.POST_TRAINING[args.recipe]):
    raise ValueError(f'--recipe {args.recipe}: {errors.some(needs)} is measured in Python; make the recipe there, and '
                     'call sparsejax.huggingface.prune_folder with it.')
  told = {'sparsity': args.sparsity, 'pattern': args.pattern and patterns.parse(args.pattern)}
  recipe = recipes.POST_TRAINING[args.recipe](**{name: value for name, value in told.items() if value is not None})
  with jax.enable_x64(False):
    made = huggingface.prune_folder(
        args.model.removeprefix('hf:'), args.out, recipe, spellings.data(args.data),
        apply=args.apply and spellings.function(args.apply), padding=args.padding, length=args.length, batch=args.batch,
        where=trees.named(*args.where) if args.where else None,
        packed=_one_pattern(args.packed) if args.packed else None, workdir=args.workdir,
        sequential=args.sequential, progress=_line)
  print(made)
  return 0


def plan(args: argparse.Namespace) -> int:
  """Prints the table of `planning.budget`, made in a new process: the number of devices of a process cannot change."""
  if args.devices is None and not args.pipeline:
    raise ValueError('plan: for how many devices? Pass --devices N.')
  asked = {'path': args.program, 'devices': args.devices or 1, 'options': dict(map(spellings.option, args.set))}
  if args.mesh:
    asked['mesh'] = spellings.mesh(args.mesh)
  if args.pipeline:
    asked['pipeline'] = spellings.mesh(args.pipeline, '--pipeline', 'stages=4,microbatches=8')
  env = {key: value for key, value in os.environ.items() if key != 'JAX_NUM_CPU_DEVICES'} | {'JAX_PLATFORMS': 'cpu'}
  env['XLA_FLAGS'] = f'{env.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={asked["devices"]}'.strip()
  done = subprocess.run([sys.executable, '-m', 'sparsejax.planning', json.dumps(asked)], env=env, text=True,
                        capture_output=True, check=False)
  if done.returncode:
    reason = done.stderr.strip().splitlines()[-1:]
    ended = [] if done.returncode == 2 and reason else [f'plan: compiling ended with status {done.returncode}']
    raise ValueError(': '.join([*ended, *reason]).removeprefix('sparsejax: '))
  print(done.stdout, end='')
  return 0


class _Parser(argparse.ArgumentParser):
  """A `_Parser` reports an error in one line."""

  def error(self, message: str) -> Any:
    self.exit(2, f'sparsejax: {message} (see {self.prog} --help)\n')


def _parser() -> argparse.ArgumentParser:
  parser = _Parser('sparsejax', description='Reports on sparse checkpoints, checks, packs and unpacks '
                   'them, advises on patterns, and plans training on devices that are not here.')
  parser.add_argument('--version', action='version', version=f'sparsejax {version.__version__}')
  commands = parser.add_subparsers(required=True, metavar='COMMAND', title='commands')
  command = _command(commands, 'report', report, 'print a table of the sparsity and pattern of each parameter')
  _selection(command, pattern_required=False)
  command = _command(commands, 'check', check, 'print a line for each parameter that does not keep the pattern; exit '
                     'status 1 if any')
  _selection(command, pattern_required=True)
  command = _command(commands, 'pack', pack, 'write one safetensors file that stores only nonzero weights')
  _selection(command, pattern_required=True)
  _output(command)
  command.add_argument('--signed-zeros', action='store_true', help='keep -0.0 as if it were a weight')
  command = _command(commands, 'unpack', unpack, 'write the dense parameters of a packed file, bit for bit')
  command.add_argument('file', metavar='FILE', help='a file written by pack, or by sparsejax.io.save')
  _output(command)
  command = _command(commands, 'advise', advise, 'print whether packing a pattern makes the parameters smaller, and '
                     'faster on a device: 2:4, "128x128 0.9", "unstructured 0.9" or "channel 0.5"')
  _selection(command, pattern_required=True)
  command.add_argument('--device', default='cpu', help='cpu, h200, tpu, or another measured device; default cpu')
  command.add_argument('--tokens', type=spellings.positive, default=1024, metavar='N', help='the number of rows that a '
                       'weight multiplies in one call, batch times length; default 1024')
  _pruning(_command(commands, 'prune', prune, 'prune the model of a Hugging Face folder on some data, and write a '
                    'folder of the same layout with zeros in place'))
  command = _command(commands, 'plan', plan, 'print the state, memory and communication of a step on devices that are '
                     'not here')
  command.add_argument('program', metavar='PROGRAM.py', help='a file with a function program(mesh, ...) that returns '
                       '(step, arguments): a function, and a tuple of pytrees of jax.ShapeDtypeStruct with shardings')
  command.add_argument('--devices', type=spellings.positive, metavar='N', help='the number of devices; none has to '
                       'be here; required without --pipeline')
  command.add_argument('--mesh', metavar='AXIS=N,...', help='the lengths of the mesh axes; default data=N')
  command.add_argument('--set', action='append', default=[], metavar='NAME=VALUE', help='an argument of the '
                       'function program; repeatable')
  command.add_argument('--pipeline', metavar='stages=N,microbatches=N', help='print the idle time of zero-bubble '
                       'schedules, for the function stage(...) of the file, which returns (f, params, x)')
  return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
  command = commands.add_parser(name, help=text, description=f'{text[0].upper()}{text[1:]}.')
  command.set_defaults(run=run)
  return command


def _pruning(command: argparse.ArgumentParser) -> None:
  command.add_argument('out', metavar='OUT', help='the folder to write')
  command.add_argument('--model', required=True, metavar='hf:FOLDER', help='a folder with config.json and safetensors '
                       f'files, of a model of type {", ".join(hub.TABLE)}')
  command.add_argument('--data', required=True, metavar='FILE', help='a UTF-8 text, through the tokenizer.json of the '
                       'folder, or token ids, int[sentences, length], as .npy')
  command.add_argument('--length', type=spellings.positive, default=texts.LENGTH, metavar='N',
                       help=f'tokens of a row of a text, at most; default {texts.LENGTH}')
  command.add_argument('--apply', metavar='MODULE:FUNCTION', help='function(params, tokens, valid) that runs a model '
                       'of any other type, with the parameters by their names in the files')
  command.add_argument('--recipe', default='sparsegpt', help=f'default sparsegpt; {", ".join(recipes.POST_TRAINING)}')
  command.add_argument('--pattern', help='a pattern, as in 2:4, 128x128 or "unstructured 0.5"; default: the recipe\'s')
  command.add_argument('--sparsity', type=float, help='the fraction of zeros')
  command.add_argument('--padding', type=int, metavar='ID', help='the token that does not count; default: '
                       'pad_token_id of config.json')
  command.add_argument('--batch', type=spellings.positive, default=huggingface.BATCH, metavar='N',
                       help='sentences in a batch')
  command.add_argument('--where', action='extend', nargs='+', metavar='GLOB', help='the parameters to prune; default: '
                       'the matrices of the transformer layers')
  command.add_argument('--sequential', default='weight', help='weight (default) or dense')
  command.add_argument('--packed', metavar='PATTERN', help='write OUT.packed.safetensors too, packed by this pattern '
                       'or format')
  command.add_argument('--workdir', metavar='FOLDER', help='keep finished matrices here, so that a run can go on')


def _selection(command: argparse.ArgumentParser, pattern_required: bool) -> None:
  command.add_argument('checkpoint', metavar='CKPT', help='a safetensors file, the folder of a sharded '
                       'safetensors checkpoint or its index, or the folder of an Orbax checkpoint')
  command.add_argument('--pattern', action='append', required=pattern_required, metavar='[GLOB=]PATTERN',
                       help='a pattern, as in 2:4, 128x128 or "unstructured 0.9", or the name of a format: '
                       f'{", ".join(_formats())}. bitmask and relative_index (smaller above 88 %% sparsity) store '
                       'zeros anywhere. GLOB=PATTERN for some parameters; repeatable')
  command.add_argument('--where', action='extend', nargs='+', metavar='GLOB', help='the parameters to read, as in '
                       'mlp/*/kernel; default: all matrices and convolutions, no embeddings, norms and biases, and '
                       'nothing that an optimizer keeps')
  command.add_argument('--except', action='extend', nargs='+', metavar='GLOB', default=[], dest='but',
                       help='leave these parameters out')
  command.add_argument('--axis', action='append', default=[], metavar='GLOB=AXIS', help='the contraction axis of some '
                       'parameters (several with commas) to which the conventions do not apply; repeatable')
  command.add_argument('--item', help='the item of a checkpoint with several items, or the key of its tree')


def _output(command: argparse.ArgumentParser) -> None:
  command.add_argument('out', metavar='OUT', help='the safetensors file to write')
  command.add_argument('--force', action='store_true', help='replace OUT if it exists')


def _opened(args: argparse.Namespace) -> checkpoints.Opened:
  where = trees.named(*args.where) if args.where else None
  return checkpoints.picked(args.checkpoint, args.item, where=where, but=args.but, given=args.axis)


def _print_notes(opened: checkpoints.Opened) -> None:
  for note in opened.notes:
    print(note)


def _formats() -> list[str]:
  """Returns the formats that `--pattern` takes by name."""
  return [kind for kind, each in formats.TABLE.items() if each.default_pattern is not None]


def _one_pattern(text: str) -> Pattern:
  """Returns the pattern that `text` spells, or the pattern that the format of this name stands for."""
  return formats.TABLE[text].default_pattern if text in _formats() else patterns.parse(text)


def _pattern(args: argparse.Namespace, read: Callable[[str], Any] = _one_pattern) -> Any:
  """Returns the pattern that `--pattern` asks for, or a dict from globs to patterns with `**`, if given, last.

  `read` turns the text of a pattern into the value to return.
  """
  texts = [text.rpartition('=') for text in args.pattern or ()]
  asked = {glob if equals else '**': read(text) for glob, equals, text in texts}
  if len(asked) != len(texts):
    raise ValueError('--pattern: two are for the same parameters; give one for each GLOB, and at most one without.')
  everywhere = asked.pop('**', None)
  return {**asked, '**': everywhere} if asked and everywhere else asked or everywhere


def _metadata(path: str) -> dict[str, str] | None:
  return io.metadata(path) if os.path.isfile(path) else None


def _refuse_to_overwrite(args: argparse.Namespace) -> None:
  folder = os.path.dirname(os.path.realpath(args.out))
  if not os.path.isdir(folder):
    raise ValueError(f'{args.out}: there is no folder {folder}; make it first.')
  if os.path.exists(args.out) and not args.force:
    raise ValueError(f'{args.out} is there already; --force replaces it.')


def _sizes(what: str, before: int, after: int) -> str:
  return f'{tables.printable(what)}: {before:,} -> {after:,} bytes ({after / max(before, 1):.4f})'


if __name__ == '__main__':
  sys.exit(main())
