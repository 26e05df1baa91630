"""The manual: pages in Markdown, in which the options and the keys are filled in from the code.

A line ``<!-- options: ksmctl -->`` becomes every verb and option of that command's parser, and
``<!-- settings -->`` every key of a settings file, and ``<!-- refusals -->`` every reason, so that
none can be documented wrongly. The result is turned into roff by go-md2man (of Debian's package of
that name; Docker's and Podman's manual is made by it), which is needed where manual pages are built
and nowhere else.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator

import ksmd
from ksmd.cli import shipped
from ksmd.model.errors import KsmdError
from ksmd.model.refusal import SENTENCES

#: Name and section of every page; each is a file of ksmd/resources/man.
PAGES = ("ksmd.8", "ksmctl.1", "ksmd.yaml.5", "ksmd.safety.7", "ksmd.news.7")
BUILDER = "go-md2man"

_MARK = re.compile(
    r"^<!-- (?P<what>options|settings|refusals)(?:: (?P<of>\w+))? -->$", re.MULTILINE
)


def markdown(page: str) -> str:
    """Give a page in Markdown, complete."""
    text = shipped.resource(f"man/{page}.md")
    name, _, section = page.rpartition(".")
    head = f'# {name} {section} "" "ksmd {ksmd.__version__}" "Manual of ksmd"\n\n'
    return head + _MARK.sub(_filled, text)


def roff(page: str) -> bytes:
    """Build a page. KsmdError when go-md2man is not there or fails."""
    builder = shutil.which(BUILDER)
    if builder is None:
        raise KsmdError(f"{BUILDER} is not installed", f"apt-get install {BUILDER}")
    done = subprocess.run(
        [builder, "-in", "/dev/stdin", "-out", "/dev/stdout"],
        input=markdown(page).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode or not done.stdout:
        raise KsmdError(f"{BUILDER} failed on {page}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def _filled(found: re.Match[str]) -> str:
    match found["what"], found["of"]:
        case "options", str(command):
            return "\n".join(_command(parsers()[command]))
        case "settings", None:
            return "\n".join(_settings())
        case "refusals", None:
            return "\n".join(_refusals())
    raise KsmdError(f"unknown mark in a manual page: {found[0]}")


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Give the parser of each command, by name."""
    from ksmd.cli import ksmctl  # noqa: PLC0415  (a verb of ksmd imports this module)
    from ksmd.cli import ksmd as command  # noqa: PLC0415

    return {"ksmd": command.parser(), "ksmctl": ksmctl.parser()}


def verbs(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Give each verb of a command: the line of help it has, and its own parser."""
    for action in parser._actions:  # argparse tells it nowhere else
        if isinstance(action, argparse._SubParsersAction):
            told = {one.dest: one.help or "" for one in action._choices_actions}
            return {name: (told.get(name, ""), sub) for name, sub in action.choices.items()}
    return {}


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Give what a parser takes, without its verbs and --help."""
    left_out = (argparse._SubParsersAction, argparse._HelpAction)
    return [action for action in parser._actions if not isinstance(action, left_out)]


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    shared = {action.dest for action in options(parser)}
    for action in options(parser):
        yield from _option(action)
    if len(shared) > 1:
        yield "Options but **--version** may stand before or after the verb."
        yield ""
    for name, (told, verb) in verbs(parser).items():
        yield f"## {parser.prog} {name}"
        yield ""
        yield f"{_plain(told[:1].upper() + told[1:])}. {_plain(_more(verb))}".rstrip()
        yield ""
        for action in options(verb):
            if action.dest not in shared:
                yield from _option(action)


def _more(verb: argparse.ArgumentParser) -> str:
    """Give what a verb's description says beyond its first line, which names the verb again."""
    paragraphs = (verb.description or "").split("\n\n")[1:]
    return " ".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _option(action: argparse.Action) -> Iterator[str]:
    metavar = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    value = f"*{metavar}*" if metavar else ""
    if action.nargs in ("+", "*") and action.option_strings:
        value += " ..."
    names = ", ".join(f"**{name}**" for name in action.option_strings)
    told = (action.help or "").replace("%%", "%") % {"default": action.default}
    choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    yield " ".join(filter(None, (names, value)))
    yield f":   {_plain(told[:1].upper() + told[1:])}.{choices}"
    yield ""


def _settings() -> Iterator[str]:
    from ksmd.settings import explain  # noqa: PLC0415  (pydantic, for one page)

    for key in explain():
        notes = "; ".join(filter(None, (key.type if key.type != "mapping" else "", _default(key))))
        yield f"**{_plain(key.path)}**" + (f" ({_plain(notes)})" if notes else "")
        yield f":   {_plain(key.help)}"
        yield ""


def _refusals() -> Iterator[str]:
    for reason, sentence in SENTENCES.items():
        yield f"**{reason}**"
        yield f":   {_plain(sentence[:1].upper() + sentence[1:])}."
        yield ""


def _default(key: object) -> str:
    default = getattr(key, "default", "")
    return default if default in ("required", "") else f"default: {default}"


def _plain(text: str) -> str:
    """Keep Markdown from reading marks into text of the code; `code` stays as it is."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_\[\]<>|~])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
