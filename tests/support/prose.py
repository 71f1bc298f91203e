"""Finds docstrings and comments that a newcomer cannot read, by rules that a program can check.

`python tests/support/prose.py FILE ...` prints what is wrong in these files, one line each.
"""

import ast
import io
import pathlib
import re
import sys
import tokenize

MOST_WORDS = 25  # of a sentence
SHORT = 6  # words of a comment behind code that need not be a sentence: `# bytes`, `# [tokens, K]`

# Pronouns that point at a noun of another sentence when a sentence begins with them.
POINTING = re.compile(r'^(it|they|them|one|ones|what|whatever|such|those|others|here|there|so|else|which|who)\b',
                      re.IGNORECASE)
POINTING_BEFORE_A_VERB = re.compile(r'^(this|these|that)\s+(\w+)', re.IGNORECASE)

# Verbs in the third person that begin the docstring of a function, or stand in a whole sentence. Add to the list.
VERBS = set("""
accepts adapts adds advises agrees aligns allocates appends applies arranges asks assembles asserts assigns averages
begins belongs bounds breaks brings broadcasts builds calls carries casts changes checks chooses clears clips closes
collects combines compares competes compiles completes composes computes concatenates concerns consists contains
continues contracts converts copies costs counts covers creates crosses cuts deals decays decides declares decodes
defers defines deletes depends describes detects determines differs differentiates distributes divides does draws
drives drops emits encodes ends enters estimates evaluates exchanges executes expands expects explains exports exposes
extends extracts feeds fetches fills filters finds fits flattens flows folds follows forgets formats freezes gathers
gets gives goes groups grows guards halves handles hands happens has helps hides holds identifies ignores imports
indexes infers initialises inserts installs interpolates intersects inverts is joins keeps knows lays leaves lets
limits lists loads locates logs looks loops lowers makes maps marks masks matches means measures meets merges mixes
moves multiplies must names needs normalises notes numbers opens orders overlaps owns packs pads pairs parses passes
permutes picks places plans plots points prefers prepares prevents prints produces projects promotes propagates
provides prunes pulls puts raises ranks reaches reads reckons recomputes records reduces refers refreshes refuses
registers rejects relates releases remains remembers removes renames repeats replaces reports represents requires
rescales reserves reshapes resolves restores resumes returns returned reverses rewrites rotates rounds runs samples
saves says scales schedules scores searches sees seeks selects sends separates serves sets settles shapes shards shares
shifts shows shrinks shuffles sits skips slices solves sorts spans specifies splits spreads stacks stands starts stays
steps stops stores streams strips subtracts sums supports swaps switches synchronises takes tells terminates tests
tiles tokenises traces tracks trains transforms translates transposes travels treats tries trims turns unpacks updates
uses validates values varies verifies visits waits walks wants warns weighs widens wraps writes yields zeroes
are have can cannot may must will would should do was were
""".split())


def sentences(text):
  """The sentences of prose: without code blocks, examples and list markers; code in backticks counts as one word."""
  text = re.sub(r'``.*?``|`[^`]*`', 'code', text)
  text = '\n'.join('' if line.startswith('    ') else line for line in text.split('\n'))
  text = re.sub(r'\([^()]*\)', '', text)  # what stands in parentheses does not lengthen the sentence around it
  text = re.sub(r'(?<=[\d\s])\.(?=\d)|(?<=\d)\.(?=\d)', ',', text)
  text = re.sub(r'\b(e\.g|i\.e|et al|vs|cf|eq|fig|sec|arXiv|no)\.', r'\1', text, flags=re.IGNORECASE)
  for paragraph in re.split(r'\n\s*\n', text):
    flat = ' '.join(paragraph.split())
    for sentence in re.split(r'(?<=[.!?:])\s+', flat):
      if sentence.strip(' .:;'):
        yield sentence.strip()


def words(sentence):
  return [word for word in re.split(r'[\s/]+', sentence) if re.search(r'[A-Za-z]', word)]


def of_text(text):
  """Problems of any prose: sentences that are too long, and sentences that begin with a pronoun for another's noun."""
  for sentence in sentences(text):
    if len(words(sentence)) > MOST_WORDS:
      yield f'{len(words(sentence))} words: {sentence}'
    if POINTING.match(sentence) and not sentence.lower().startswith(('there is', 'there are')):
      yield f'begins with a pronoun: {sentence}'
    elif (found := POINTING_BEFORE_A_VERB.match(sentence)) and found[2].lower() in VERBS:
      yield f'begins with a pronoun: {sentence}'


def first_sentence(docstring):
  return next(sentences(docstring), '')


def of_docstring(node, docstring):
  first = first_sentence(docstring)
  spoken = [word.strip('.,:;()').lower() for word in words(first)]
  if not re.match(r'[A-Z`\'"0-9|]|code', docstring.strip()):
    yield f'does not begin with a capital: {first}'
  if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
    is_property = any(getattr(d, 'id', getattr(d, 'attr', '')) in ('property', 'cached_property')
                      for d in node.decorator_list)
    if not is_property and (not spoken or spoken[0] not in VERBS) and not VERBS.intersection(spoken[:8]):
      yield f'does not say what the function does (Returns, Maps, ...): {first}'
  elif not VERBS.intersection(spoken):
    yield f'has no verb in its first sentence: {first}'
  if not docstring.strip().split('\n\n')[0].rstrip().endswith(('.', ':', '!', '?', '`')):
    yield f'is no whole sentence: {first}'
  yield from of_text(docstring)


def docstrings(tree):
  """Every docstring with the node that it belongs to."""
  for node in ast.walk(tree):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
      text = ast.get_docstring(node)
      if text:
        yield node, text


def comments(source):
  """Comments as `(line, text, alone)`; those on lines of their own that follow each other are one."""
  block = None
  lines = source.split('\n')
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type != tokenize.COMMENT:
      continue
    alone = not lines[token.start[0] - 1][:token.start[1]].strip()
    text = token.string.lstrip('#').strip()
    if alone and block and block[0] + block[3] == token.start[0]:
      block = (block[0], f'{block[1]} {text}', True, block[3] + 1)
      continue
    if block:
      yield block[:3]
    block = (token.start[0], text, True, 1) if alone else None
    if not alone:
      yield token.start[0], text, False
  if block:
    yield block[:3]


def of_comment(text, alone):
  if re.match(r'(!|type:|noqa|pyright:|pragma|ruff:|fmt:)', text):
    return
  spoken = [word.strip('.,:;()').lower() for word in words(re.sub(r'`[^`]*`', 'code', text))]
  if alone and len(spoken) > SHORT and not VERBS.intersection(spoken):
    yield f'has no verb: {text}'
  yield from of_text(text)


def problems(path):
  """What is wrong with the prose of one file, as `line: what`."""
  source = pathlib.Path(path).read_text()
  for node, text in docstrings(ast.parse(source)):
    name = getattr(node, 'name', 'module')
    yield from (f'{getattr(node, "lineno", 1)}: docstring of {name} {why}' for why in of_docstring(node, text))
  for line, text, alone in comments(source):
    yield from (f'{line}: comment {why}' for why in of_comment(text, alone))


if __name__ == '__main__':
  found = [f'{path}:{problem}' for path in sys.argv[1:] for problem in problems(path)]
  print('\n'.join(found))
  sys.exit(bool(found))
