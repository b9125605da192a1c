"""The chat template of a model in the language Jinja, in which transformers and llama.cpp read it."""

import json
from pathlib import Path
from typing import Any

from timemix.data.templates import TEMPLATES, ChatTemplate, template_of
from timemix.errors import FileError
from timemix.storage.json_files import read_json
from timemix.tokenizers.base import Tokenizer

FILE = "chat_template.jinja"
"""File of the template in a folder of Hugging Face."""

# As in ChatTemplate.render, messages of the system and the user lose their blank lines, so they cannot contain the
# separator. The newlines at the starts and ends of tags are no part of the text.
_JINJA = """{%- set new = namespace(text='', body='') -%}
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('the role ' ~ message['role'] ~ ' is not supported; use system, user or assistant') -}}
  {%- endif -%}
  {%- if message['content'] is not string -%}
    {{- raise_exception('the content of a message must be a text') -}}
  {%- endif -%}
  {%- set content = message['content'].replace('\\r\\n', '\\n').replace('\\r', '\\n') -%}
  {%- set new.body = content -%}
  {%- if message['role'] != 'assistant' -%}
    {%- set new.body = '' -%}
    {%- for line in content.split('\\n') -%}
      {%- if line.strip() -%}
        {%- set new.body = new.body ~ ('\\n' if new.body else '') ~ line -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set new.body = new.body.strip() -%}
  {%- if new.body -%}
    {%- set label = message['role'].capitalize() ~ ': ' -%}
    {%- set new.text = new.text ~ (SEPARATOR if new.text else '') ~ label ~ new.body -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not (messages and messages[-1]['role'] == 'assistant' and new.body) -%}
  {%- set new.text = new.text ~ (SEPARATOR if new.text else '') ~ 'Assistant:' -%}
{%- endif -%}
{{- new.text -}}
"""


def to_jinja(template: ChatTemplate) -> str | None:
    """Return a template in Jinja.

    With `add_generation_prompt`, the text of the Jinja template equals that of `ChatTemplate.render`. The white space
    at the end of a last message of the assistant is an exception: the Jinja template removes it.

    Args:
        template: The template.

    Returns:
        The text of the Jinja template, or None for a template without labels, which has no form for other programs.
    """
    return _JINJA.replace("SEPARATOR", json.dumps(template.separator)) if template.has_labels else None


def write_template(folder: Path, tokenizer: Tokenizer, trained: str | None) -> None:
    """Write the chat template of a model to a folder, unless the model knows no conversations.

    Args:
        folder: The folder.
        tokenizer: Tokenizer of the model.
        trained: Name of the template of the conversations that the model was trained on; None: other text.
    """
    if (text := to_jinja(template_of(tokenizer, trained))) is not None:
        (folder / FILE).write_text(text, encoding="utf-8", newline="")


def template_in(folder: Path) -> str | None:
    """Return the name of the template that `timemix export` wrote to a folder of Hugging Face.

    Args:
        folder: The folder.

    Returns:
        The name, or None if the folder has no template, or a template of another program.
    """
    try:
        text = (folder / FILE).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        text = _of_config(folder)
    return next((name for name, each in TEMPLATES.items() if text is not None and text == to_jinja(each)), None)


def _of_config(folder: Path) -> Any:
    """Return the template in tokenizer_config.json, where older versions of transformers write it."""
    try:
        return read_json(folder / "tokenizer_config.json").get("chat_template")
    except FileError:
        return None
