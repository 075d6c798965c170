"""A row's messages, in the forms in which data sets have them, as one form: {role, content} and what tools need."""

import json

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
SYSTEM_ROLES = ("system", "developer")
OF_TOOLS = ("tool_calls", "name", "tool_call_id")  # fields of a message beside role and content


class BadRow(Exception):
    """Says why a row cannot be used. column: where the fault is; reason: what is wrong, and what would be right."""

    def __init__(self, column: str, reason: str):
        super().__init__(f"column {column!r}: {reason}")


def shorten(value) -> str:
    """A value in at most 60 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def conversation_of(row: dict, columns) -> list[dict]:
    """The messages of a row as {role, content, thinking}, with tool_calls, name and tool_call_id where they have them.

    At most one system (or developer) message comes first, then user and assistant in turns. What tools returned (role
    tool) stands between two messages of the assistant. Also reads messages of the form {from: human | gpt, value},
    content in parts of the type text, and messages as a text of JSON. An empty system message is left out. Raises
    BadRow for any other form.
    """
    column, messages = columns.messages, _from_json(row[columns.messages])
    no_messages = f"{shorten(messages)} is not a list of messages (role, content)"
    if not isinstance(messages, list) or not messages:
        raise BadRow(column, no_messages)
    first = messages[0]
    empty_system = (
        isinstance(first, dict)
        and (first.get("role") in SYSTEM_ROLES or first.get("from") in SYSTEM_ROLES)
        and not (first.get("content") or first.get("value"))
    )
    numbered = list(enumerate(messages))[1 if empty_system else 0 :]
    found = [_message(message, f"{column}[{number}]") for number, message in numbered]
    if not found:
        raise BadRow(column, no_messages)
    roles = [message["role"] for message in found]
    begin = 1 if roles[0] in SYSTEM_ROLES else 0
    for number in range(begin, len(roles)):
        allowed = _may_speak(found[number - 1] if number > begin else None)
        if roles[number] not in allowed:
            raise BadRow(
                f"{column}[{number}]",
                f"the role is {roles[number]!r} where {allowed[0]!r} should speak: user and assistant have to "
                "alternate, after at most one system message; results of tools follow the assistant's message",
            )
    if "assistant" not in roles:
        raise BadRow(column, "the conversation has no turn of the assistant")
    return found


def _may_speak(before: dict | None) -> tuple[str, ...]:
    """The roles that may follow a message, the expected one first."""
    if before is None:
        return ("user",)
    if before["role"] == "tool":
        return ("assistant", "tool")
    if before["role"] == "assistant":
        return ("tool",) if "tool_calls" in before else ("user", "tool")
    return ("assistant",)


def spoken(message: dict) -> dict:
    """A message for the chat template, without its thinking."""
    return {key: message[key] for key in ("role", "content", *OF_TOOLS) if key in message}


def tools_of(row: dict, columns) -> list[dict]:
    """The tools of a row (columns.tools): a list of mappings, or a text of JSON."""
    if columns.tools is None or row[columns.tools] is None:
        return []
    tools = _without_nulls(_from_json(row[columns.tools]))
    tools = [_from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(columns.tools, f"{shorten(row[columns.tools])} is not a list of tools (mappings)")
    return tools


def _message(message, place: str) -> dict:
    if not isinstance(message, dict):
        raise BadRow(place, f"{shorten(message)} is not a message (role, content)")
    sharegpt = message.get("from") is not None
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role, content = message.get(role_key), message.get(content_key)
    if isinstance(content, list) and all(map(_is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if role is not None and not isinstance(role, str):
        raise BadRow(f"{place}.{role_key}", f"{shorten(role)} is not text")
    field = "reasoning_content" if message.get("reasoning_content") else "thinking"
    thinking = message.get(field)
    if thinking and not isinstance(thinking, str):
        raise BadRow(f"{place}.{field}", f"{shorten(thinking)} is not text")
    role = SHAREGPT_ROLES.get(role, role)
    calls = _calls(message.get("tool_calls"), f"{place}.tool_calls") if role == "assistant" else []
    if (calls or role == "tool") and (content is None or content == ""):  # an answer that only calls; no result
        content = ""
    else:
        content = text_of(content, f"{place}.{content_key}")
    found = {"role": role, "content": content, "thinking": thinking}
    if calls:
        found["tool_calls"] = calls
    named = {key: message.get(key) for key in ("name", "tool_call_id")} if role == "tool" else {}
    return found | {key: value for key, value in named.items() if isinstance(value, str)}


def _calls(calls, place: str) -> list[dict]:
    """Tool calls as {type: function, function: {name, arguments}}, with their id. Arguments are mappings."""
    calls = _from_json(calls)
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise BadRow(place, f"{shorten(calls)} is not a list of calls")
    found = []
    for number, call in enumerate(calls):
        inner = call.get("function") or call if isinstance(call, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(name, str) or not name:
            raise BadRow(f"{place}[{number}]", f"{shorten(call)} is not a call of a function (name, arguments)")
        arguments = inner.get("arguments")
        arguments = _from_json(arguments) if isinstance(arguments, str) else _without_nulls(arguments)
        if arguments is not None and not isinstance(arguments, dict):
            raise BadRow(f"{place}[{number}].arguments", f"{shorten(arguments)} is not a mapping")
        function = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
        found.append(function | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return found


def _from_json(value):
    """The list or mapping that a text of JSON holds; any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _without_nulls(value):
    """Without null values: in a table every mapping has the keys of all of them, null where it has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_text_part(part) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def text_of(value, column: str, speaker: str | None = None) -> str:
    """The text of a field: the value itself, or the content of one message of a speaker (user, assistant).

    Raises BadRow for anything else, and for empty text.
    """
    inner = value[0] if isinstance(value, list) and len(value) == 1 else value
    if speaker is not None and isinstance(inner, dict) and inner.get("role") == speaker and "content" in inner:
        value = inner["content"]
    if not isinstance(value, str):
        raise BadRow(column, f"{shorten(value)} is not text")
    if not value.strip():
        raise BadRow(column, f"{shorten(value)} is empty")
    return value
