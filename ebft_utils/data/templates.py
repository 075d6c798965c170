"""The tokenizer's chat template: a conversation -> the text before, between and of its answers.

Where an answer stands is found by rendering. An answer that is text is rendered as ANSWER, and found again; its own
text is put there later, as it is. An answer that calls tools is what the template writes for it.

    opening = rendered(messages before the answer, with the header that asks for one)
    between = rendered(.. and the answer, and the messages after it, with the next header) without what came before
"""

import datetime
import re

import jinja2
from transformers import PreTrainedTokenizerBase

from ..config.modes import Config
from ..config.settings import UserError
from .transforms import END_OF_THINKING, START_OF_THINKING, BadRow, shorten

# For chat templates that write the date (Llama 3.2's default day). With today's date, a run would not repeat tomorrow.
TEMPLATE_DAY = datetime.date(2024, 7, 26)
EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")
THINKING_PART = re.compile(r"<think>\s*(</think>\s*)?")  # empty thinking that a template adds, or opens
ANSWER = "\u2063answer\u2063"  # stands for an answer in a rendered conversation, and is found again in it
CALL = {"id": "probe0123", "type": "function", "function": {"name": "probe_name", "arguments": {"key": "probe_value"}}}
PROBE = [  # a conversation with a tool, which a template renders if it knows of tools
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "probe_result", "name": "probe_name", "tool_call_id": "probe0123"},
]
NOTHING = {"type": "object", "properties": {}}
PROBE_TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "none", "parameters": NOTHING}}

Message = dict


class ChatTemplate:
    """Renders conversations. trims: whether it strips white space around an answer; None: not known yet."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase):
        self.config, self.tokenizer, self.trims = config, tokenizer, None
        self.knows_developer = "developer" in str(tokenizer.chat_template)
        self._knows_tools = {}  # whether tools are asked for -> what the template lacks

    def rendered(
        self, messages: list[Message], answers: list, further: list[list[Message]], tools: list | None, column: str
    ) -> tuple[str, list[str], list[str]]:
        """The prompt in the chat template, the answers, and the text that the template puts between two of them.

        messages: the prompt. answers: each is text, or a message with tool_calls. further[k]: the messages between the
        answers k and k + 1. column: for error messages.
        """
        if not messages or not all(map(_is_message, messages)):
            raise BadRow(column, f"{shorten(messages)} is not a list of messages (role, content)")
        if not messages[-1]["content"].strip():
            raise BadRow(column, f"the last message is empty: {shorten(messages[-1])}")
        if self.tokenizer.chat_template is None:
            raise UserError(
                "model.tokenizer: the rows hold messages, and the tokenizer has no chat template; take the tokenizer "
                "of an instruction-tuned model, or a transform that makes a prompt of plain text"
            )
        settings = {"tools": tools} if tools else {}
        self._check_tools([*messages, *answers, *(message for later in further for message in later)], tools, column)
        try:
            opening, gaps = self._chat(messages, True, **settings), []
            if self.trims is None:
                self._check(messages, opening, settings)
            messages, asked, answers = list(messages), opening, list(answers)
            for number, later in enumerate([*further, None]):
                if isinstance(answer := answers[number], dict):
                    answers[number] = self._call(messages, answer, asked, settings, column)
                if later is None:
                    break
                stands = answer if isinstance(answer, dict) else {"role": "assistant", "content": ANSWER}
                messages += [stands, *later]
                before, asked = asked, self._chat(messages, True, **settings)
                if isinstance(answer, dict):
                    gaps.append(self._behind(asked, before, answers[number], column))
                else:
                    gaps.append(self._gap(asked))
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise BadRow(column, f"the tokenizer's chat template cannot render {shorten(messages)}: {error}") from None
        return opening, answers, gaps

    def _chat(self, messages: list[Message], generation_prompt: bool, **settings) -> str:
        if self.config.data.enable_thinking is not None:
            settings = {"enable_thinking": self.config.data.enable_thinking} | settings
        if not self.knows_developer:  # the newer name of the system's role
            messages = [message | {"role": _known_role(message["role"])} for message in messages]
        settings |= {"add_generation_prompt": generation_prompt, "strftime_now": TEMPLATE_DAY.strftime}
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **settings)

    def _check(self, messages: list[Message], opening: str, settings: dict) -> None:
        """Finds out whether the template strips answers, and raises UserError for a template that cannot be used.

        It cannot be used when an answered conversation does not begin with the rendered prompt, or when it lacks the
        switch that data.enable_thinking sets.
        """
        if self.config.data.enable_thinking is not None:
            switched = ({**settings, "enable_thinking": switch} for switch in (True, False))
            on, off = (self._chat(messages, True, **both) for both in switched)
            if on == off:
                raise UserError(
                    "data.enable_thinking: the tokenizer's chat template has no such switch: it writes the same with "
                    "true and with false; leave it out"
                )
        answered = self._chat([*messages, {"role": "assistant", "content": ANSWER}], False, **settings)
        self._gap(answered)
        before, asked = (THINKING_PART.sub("", text) for text in (answered.partition(ANSWER)[0], opening))
        if before != asked:
            puts, asks = shorten(before[-30:]), shorten(asked[-30:])
            raise UserError(
                f"model.tokenizer: the chat template puts {puts} before an answer, and asks for one with {asks}: "
                "it has no use for add_generation_prompt; take a tokenizer whose template has"
            )
        spaced = f" {ANSWER} "
        answer = {"role": "assistant", "content": spaced}
        self.trims = spaced not in self._chat([*messages, answer], False, **settings)

    def _gap(self, rendered: str) -> str:
        """The text that the template puts after the last answer, without the end-of-text token that ends the answer.

        Raises UserError when the template ends an answer with another token.
        """
        gap, end = rendered.rpartition(ANSWER)[2], self.tokenizer.eos_token
        if not gap.startswith(end):
            raise UserError(
                f"model.eos_token: the chat template does not end an answer with {end!r} but with {shorten(gap[:20])}; "
                "name the token that ends an answer"
            )
        return gap.removeprefix(end)

    # --- tools --------------------------------------------------------------------------------------------------------

    def _check_tools(self, messages: list, tools: list | None, column: str) -> None:
        """Raises BadRow for a conversation with tools and a template that leaves them out."""
        talk = [message for message in messages if isinstance(message, dict)]
        if not tools and not any(message.get("tool_calls") or message["role"] == "tool" for message in talk):
            return
        if bool(tools) not in self._knows_tools:
            self._knows_tools[bool(tools)] = self._lacks([PROBE_TOOL] if tools else None)
        if lacks := self._knows_tools[bool(tools)]:
            remedy = "take the tokenizer of a model that calls tools (model.tokenizer)"
            raise BadRow(column, f"the conversation has tools, and the tokenizer's chat template {lacks}; {remedy}")

    def _lacks(self, tools: list | None) -> str | None:
        """What a template does not write of a conversation with tools. None: it writes all."""
        try:
            rendered = self._chat(PROBE, True, **({"tools": tools} if tools else {}))
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            return f"cannot render it: {error}"
        parts = {"probe_name": "calls", "probe_value": "arguments of calls", "probe_result": "results of tools"}
        parts |= {"probe_tool": "list of tools (data.columns.tools)"} if tools else {}
        missing = [words for mark, words in parts.items() if mark not in rendered]
        return f"writes no {', no '.join(missing)}" if missing else None

    def _call(self, messages: list[Message], answer: Message, asked: str, settings: dict, column: str) -> str:
        """What the template writes for an answer with tool calls, without the end-of-text token."""
        head, whole = _head(asked), self._chat([*messages, answer], False, **settings)
        text, end, _ = EMPTY_THINKING.sub("", whole[len(head) :], count=1).rpartition(self.tokenizer.eos_token)
        if not whole.startswith(head) or not end:
            puts = shorten(whole[-30:])
            raise BadRow(
                column,
                f"the chat template does not put a tool call between its header {shorten(head[-20:])} and the end of "
                f"an answer {self.tokenizer.eos_token!r}: it ends with {puts}; set model.eos_token, or leave tools out",
            )
        return text

    def _behind(self, asked: str, before: str, text: str, column: str) -> str:
        """The text that the template puts after an answer with tool calls."""
        head, answer = _head(before), text + self.tokenizer.eos_token
        rest = asked[len(head) :]
        rest = rest if rest.startswith(answer) else EMPTY_THINKING.sub("", rest, count=1)
        if not asked.startswith(head) or not rest.startswith(answer):
            raise BadRow(
                column,
                f"the chat template writes the tool call {shorten(text)} in another form once messages follow it; "
                "take the transform last_turn",
            )
        return rest.removeprefix(answer)


def _head(asked: str) -> str:
    """A rendered prompt up to the header that asks for an answer, without thinking that is opened or left empty."""
    return re.sub(rf"{START_OF_THINKING}\s*({END_OF_THINKING}\s*)?$", "", asked)


def _known_role(role: str) -> str:
    return "system" if role == "developer" else role


def _is_message(message) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
