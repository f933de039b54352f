"""Completion for shells, as a script that is made once.

A completion that asked this program at every key would import torch each time, which takes longer
than typing. The script knows commands, options and choices, and completes anything else to files.
"""

from argparse import ArgumentParser
from collections.abc import Iterator, Mapping

_SCRIPT = """\
# Completion of {program} for bash; in zsh, after: autoload -U +X bashcompinit && bashcompinit
_{program}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W '{commands} --help --version' -- "$word"))
        return
    fi
    case "$command ${{COMP_WORDS[COMP_CWORD - 1]}}" in
{choices}
    esac
    case "$command" in
{options}
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}}
complete -o filenames -F _{program} {program}"""


def completion_script(program: str, commands: Mapping[str, ArgumentParser]) -> str:
    """Return a script of bash, which zsh reads too, for the commands of a program."""
    options = (
        f"        {name}) words='{' '.join(_options(parser))}' ;;"
        for name, parser in commands.items()
    )
    choices = (
        f"        '{name} {option}') COMPREPLY=($(compgen -W '{' '.join(known)}' -- \"$word\")); "
        "return ;;"
        for name, parser in commands.items()
        for option, known in _choices(parser)
    )
    return _SCRIPT.format(
        program=program,
        commands=" ".join(commands),
        choices="\n".join(choices),
        options="\n".join(options),
    )


def _options(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:  # argparse has no public list of them
        yield from (one for one in action.option_strings if one.startswith("--"))


def _choices(parser: ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    for action in parser._actions:
        if action.choices is not None:
            known = [str(choice) for choice in action.choices]
            yield from ((option, known) for option in action.option_strings)
