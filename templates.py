"""Parse and render the texts of messages: Liquid with `client.*` and `vars.*`, in a sandbox. Touches no table.

python-liquid parses a text; this file evaluates the tree itself. It refuses each tag, filter and kind of expression
that it does not list, so no tag of the library and no attribute of a Python object can be reached. Example:

    text = templates.parse("Hello {{ client.name }}, {{ vars.code }}", known={"name"}, variables={"code": "X"})
    text.render({"name": "Jane"}, zone).body  # "Hello Jane, X"
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, tzinfo
from decimal import Decimal
from typing import NamedTuple, NoReturn

from liquid import Environment, Mode
from liquid.ast import BlockNode, Node
from liquid.builtin import content, illegal, output
from liquid.builtin.content import ContentNode
from liquid.builtin.expressions import FilteredExpression, Nil, Path, parse_primitive
from liquid.builtin.expressions.arguments import PositionalArgument
from liquid.builtin.expressions.filtered import Filter
from liquid.builtin.expressions.logical import (
    BooleanExpression,
    ContainsExpression,
    EqExpression,
    GeExpression,
    GtExpression,
    LeExpression,
    LogicalAndExpression,
    LogicalOrExpression,
    LtExpression,
    NeExpression,
)
from liquid.builtin.expressions.primitive import (
    Blank,
    Empty,
    FalseLiteral,
    FloatLiteral,
    IntegerLiteral,
    StringLiteral,
    TrueLiteral,
)
from liquid.builtin.output import OutputNode
from liquid.builtin.tags.assign_tag import AssignNode, AssignTag
from liquid.builtin.tags.case_tag import CaseNode, CaseTag, MultiExpressionBlockNode
from liquid.builtin.tags.comment_tag import CommentNode, CommentTag
from liquid.builtin.tags.if_tag import IfNode, IfTag
from liquid.builtin.tags.unless_tag import UnlessNode, UnlessTag
from liquid.exceptions import BlockNestingError, LiquidError
from liquid.expression import Expression
from liquid.stream import TokenStream
from liquid.tag import Tag
from liquid.token import TOKEN_COMMA, TOKEN_OR, Token

import values
from values import MAX_BODY, EmptyVariable, Missing, Rendering, TooLong

__all__ = ["EmptyVariable", "Rendered", "Template", "TemplateError", "TooLong", "parse"]

MAX_TEMPLATE = 4096  # bytes
MAX_LITERAL_DIGITS = 15
MAX_TAG = 500  # characters from {{ to }}: the library's lexer needs the square of it for white space
MAX_NESTING = 10  # of if, unless and case
TAGS = "if, elsif, else, unless, case, when, assign, comment"

OPENING = re.compile(r"\{\{|\{%")
CLOSING = {"{{": "}}", "{%": "%}"}
# A brace too few, or too many: {client.name}, { client.name }}, {{ client.name }}}.
STRAY_BRACES = re.compile(r"\}\}|%\}|(?<=\}\})\}|\{\s*(?:client|vars)\b")
# The library's lexer takes these out before any tag is looked up.
LEXED_TAG = re.compile(r"\{%-?\s*(raw|doc)\b")
# The library's words for what stands in a text.
WORDS = {
    "a primitive expression": "a value",
    "end of expression": "the end",
    "word": "a name",
    "missing expression": "a value is missing here",
}


class TemplateError(ValueError):
    """An error in the text itself, whoever it is for. `str()` names the line and the column, both from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(f"line {line}, column {column}: {message}")
        self.message, self.line, self.column = message, line, column


class Rendered(NamedTuple):
    """The text for one person."""

    body: str  # 1 to MAX_BODY characters
    defaults_taken: bool  # whether a `default` stood in for a value


class Template(NamedTuple):
    """A text that parse() has checked."""

    variables: frozenset[str]  # the names of client.* that it reads, also in conditions: {"name"}
    run: "Step"

    def render(self, client: Mapping[str, object], zone: tzinfo) -> Rendered:
        """Return the text for one person, whose time zone is `zone`.

        Raises EmptyVariable and TooLong for this person, TemplateError for the text.
        """
        rendering = Rendering(client, zone)
        try:
            self.run(rendering)
        except (MemoryError, RecursionError) as error:
            raise TemplateError(f"the text needs too much memory ({type(error).__name__})", 1, 1) from error
        body = values.clean("".join(rendering.output))
        if len(body) > MAX_BODY:
            raise TooLong(len(body))
        if values.is_blank(body):
            raise EmptyVariable("text", "the text is empty")
        if "{{" in body or "{%" in body:
            names = [name for name in sorted(self.variables) if "{" in str(client.get(name))]
            name = f"client.{names[0]}" if names else "text"
            raise EmptyVariable(name, f"{name} would put {{{{ or {{% into the text")
        return Rendered(body, rendering.defaults_taken)


def parse(text: str, known: Collection[str], variables: Mapping[str, object] | None = None) -> Template:
    """Check a text. `known`: the names that somebody's client.* has; `variables`: the values of vars.*.

    Raises TemplateError, also for a variable that nobody has, so that nothing is written before the text is right.
    """
    text = values.LINE_BREAK.sub("\n", text.removeprefix("\ufeff"))
    size = len(text.encode(errors="replace"))
    if size > MAX_TEMPLATE:
        raise TemplateError(f"the text has {size:,} bytes; at most {MAX_TEMPLATE:,} are possible", 1, 1)
    compiler = Compiler(text, known, variables or {})
    if values.is_blank(text):
        compiler.fail("the text is empty", 0)
    compiler.check_braces()
    if lexed := LEXED_TAG.search(text):
        compiler.fail(f"there is no tag {lexed[1]!r}; use {TAGS}", lexed.start(1))
    try:
        nodes = SANDBOX.from_string(text).nodes
        run = compiler.block(nodes)
    except LiquidError as error:
        nested = isinstance(error.__cause__, RecursionError) or isinstance(error, BlockNestingError)
        message = "too much is nested" if nested else explain(str(error.message))
        compiler.fail(message, error.token.start_index if error.token else -1)
    except (MemoryError, RecursionError):
        compiler.fail("too much is nested", 0)
    return Template(frozenset(compiler.read), run)


def explain(message: str) -> str:
    """Say an error of the library in words for the author of a text."""
    if tag := re.fullmatch("unexpected tag '(.*)'", message):
        return f"the tag {tag[1]!r} cannot stand here; use {TAGS}"
    if tag := re.fullmatch("expected tag (end.*), found .*", message):
        return f"the tag {tag[1]!r} is missing"
    if reserved := re.fullmatch("expected an identifier, found (.*)", message):
        return f'after the dot a name stands; if it is called {reserved[1]!r}, write client["{reserved[1]}"]'
    for word, plain in WORDS.items():
        message = re.sub(rf"\b{word}\b", plain, message)
    return message


# --- what the library may parse -----------------------------------------------------------------------


class StrictIf(IfTag):
    """Refuse `{% else if … %}`, whose condition the library would ignore."""

    mode = Mode.STRICT


class StrictUnless(UnlessTag):
    """Refuse `{% else if … %}`, whose condition the library would ignore."""

    mode = Mode.STRICT


class StrictCase(CaseTag):
    """Refuse `{% when "a" "b" %}` and `{% when "a", ? %}`, of which the library would ignore the second value."""

    def _parse_when_expression(self, stream: TokenStream) -> list[Expression]:
        expressions = [parse_primitive(self.env, stream)]
        while stream.current.kind in (TOKEN_COMMA, TOKEN_OR):
            next(stream)
            expressions.append(parse_primitive(self.env, stream))
        stream.expect_eos()
        return expressions


class Sandbox(Environment):
    """The library's parser with our tags alone. Its filters are not used: see values.FILTERS."""

    block_nesting_limit = MAX_NESTING

    def setup_tags_and_filters(self, *, extra: bool = False) -> None:
        """Register the tags that this file evaluates."""
        del extra
        tags: list[type[Tag]] = [content.Literal, output.Output, illegal.Illegal]
        tags += [StrictIf, StrictUnless, StrictCase, AssignTag, CommentTag]
        for tag in tags:
            self.add_tag(tag)


SANDBOX = Sandbox()
COMPARISONS: Mapping[type, Callable[[object, object, Rendering], bool]] = {
    EqExpression: values.is_equal,
    NeExpression: lambda left, right, rendering: not values.is_equal(left, right, rendering),
    LtExpression: values.is_less,
    LeExpression: values.is_less_or_equal,
    GtExpression: lambda left, right, rendering: values.is_less(right, left, rendering),
    GeExpression: lambda left, right, rendering: values.is_less_or_equal(right, left, rendering),
    ContainsExpression: values.contains,
}


# --- the tree, checked and turned into functions --------------------------------------------------------


Step = Callable[[Rendering], None]
Evaluate = Callable[[Rendering], object]


class Value(NamedTuple):
    """An expression, and what it depends on."""

    evaluate: Evaluate
    names: tuple[str, ...] = ()  # such as client.name: who is to blame for an unusable value
    is_constant: bool = False  # the same for everybody: evaluated once while parsing, to find its errors


class Compiler:
    """Turn the library's tree into functions. What has no method here is refused."""

    def __init__(self, source: str, known: Collection[str], given: Mapping[str, object]) -> None:
        self.source, self.known, self.given = source, known, given
        self.read: set[str] = set()
        self.locals: dict[str, tuple[str, ...]] = {}  # a name that assign made: the variables it depends on

    def fail(self, message: str, index: int) -> NoReturn:
        """Raise TemplateError for a place in the source; -1 is its end."""
        before = self.source[:index] if index >= 0 else self.source
        raise TemplateError(message, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)

    def check_braces(self) -> None:
        """Refuse a {{ or {% that is not closed before the next one."""
        place = 0
        while opening := OPENING.search(self.source, place):
            start, brace = opening.start(), opening[0]
            place = self.source.find(CLOSING[brace], opening.end()) + 2
            if place < 2 or OPENING.search(self.source, opening.end(), place):
                self.fail(f"this {brace} has no {CLOSING[brace]}", start)
            if place - start > MAX_TAG:
                self.fail(f"from {brace} to {CLOSING[brace]} there are at most {MAX_TAG} characters", start)

    def block(self, nodes: Sequence[Node]) -> Step:
        steps = [self.node(node) for node in nodes]

        def run(rendering: Rendering) -> None:
            for step in steps:
                step(rendering)

        return run

    def node(self, node: Node) -> Step:
        match node:
            case ContentNode():
                return self.content(node)
            case OutputNode():
                return self.print(node)
            case IfNode() | UnlessNode():
                return self.branches(node)
            case CaseNode():
                return self.case(node)
            case AssignNode():
                return self.assign(node)
            case CommentNode():
                return lambda _: None
        self.fail(f"there is no tag {node.token.value!r}; use {TAGS}", node.token.start_index)

    def content(self, node: ContentNode) -> Step:
        start = self.source.find(node.text, node.token.start_index)
        if stray := STRAY_BRACES.search(self.source, start, start + len(node.text)):
            self.fail(
                f"a variable stands in two braces, {{{{ client.name }}}}; here is a stray {stray[0]!r}", stray.start()
            )
        return lambda rendering: rendering.output.append(node.text)

    def print(self, node: OutputNode) -> Step:
        value = self.filtered(node.expression)
        printed = self.guard(lambda rendering: values.to_text(value.evaluate(rendering), rendering), value, node.token)
        if value.is_constant:
            self.try_out(printed, node.token)
        return lambda rendering: rendering.output.append(str(printed(rendering)))

    def branches(self, node: IfNode | UnlessNode) -> Step:
        first = self.condition(node.condition)
        negated = isinstance(node, UnlessNode)
        choices: list[tuple[Evaluate, Step]] = [
            ((lambda rendering: not first(rendering)) if negated else first, self.block(node.consequence.nodes))
        ]
        for choice in node.alternatives:
            choices.append((self.condition(choice.expression), self.block(choice.block.nodes)))
        return choose(choices, self.block(node.default.nodes) if node.default else None)

    def case(self, node: CaseNode) -> Step:
        left = self.value(node.expression)
        choices: list[tuple[Evaluate, Step]] = []
        for block in node.blocks:
            if isinstance(block, MultiExpressionBlockNode):
                if choices and choices[-1][0] is always:
                    self.fail("'else' is the last part of a case", block.token.start_index)
                options = [self.value(expression) for expression in block.expression.expressions]
                choices.append((self.one_of(left, options), self.block(block.block.nodes)))
            elif isinstance(block, BlockNode):
                choices.append((always, self.block(block.nodes)))
        return choose(choices, None)

    def one_of(self, left: Value, options: Sequence[Value]) -> Evaluate:
        def evaluate(rendering: Rendering) -> bool:
            wanted = left.evaluate(rendering)
            return any(values.is_equal(wanted, option.evaluate(rendering), rendering) for option in options)

        return evaluate

    def assign(self, node: AssignNode) -> Step:
        name = str(node.name)
        if name in ("client", "vars"):
            self.fail(f"{name!r} has its values already: choose another name", node.name.token.start_index)
        value = self.filtered(node.expression)
        self.locals[name] = tuple(dict.fromkeys((*self.locals.get(name, ()), *value.names)))

        def run(rendering: Rendering) -> None:
            rendering.locals[name] = value.evaluate(rendering)

        return run

    # conditions

    def condition(self, expression: Expression) -> Evaluate:
        if isinstance(expression, BooleanExpression):
            expression = expression.expression
        for kind, other, every in (
            (LogicalAndExpression, LogicalOrExpression, all),
            (LogicalOrExpression, LogicalAndExpression, any),
        ):
            if isinstance(expression, kind):
                parts = []
                while isinstance(expression, kind):
                    parts.append(self.comparison(expression.left))
                    expression = expression.right
                if isinstance(expression, other):
                    self.fail(
                        "'and' and 'or' in one condition can be read in two ways: use two tags",
                        expression.token.start_index,
                    )
                parts.append(self.comparison(expression))
                return lambda rendering: every(part(rendering) for part in parts)
        return self.comparison(expression)

    def comparison(self, expression: Expression) -> Evaluate:
        test = COMPARISONS.get(type(expression))
        if test is None:
            value = self.value(expression)
            return self.guard(lambda rendering: values.is_true(value.evaluate(rendering)), value, expression.token)
        left, right = (self.value(side) for side in (expression.left, expression.right))  # type: ignore[attr-defined]
        both = Value(always, left.names + right.names, left.is_constant and right.is_constant)
        evaluate = self.guard(
            lambda rendering: test(left.evaluate(rendering), right.evaluate(rendering), rendering),
            both,
            expression.token,
        )
        if both.is_constant:
            self.try_out(evaluate, expression.token)
        return evaluate

    # values

    def value(self, expression: Expression) -> Value:
        match expression:
            case Path():
                return self.path(expression)
            case StringLiteral():
                return constant(values.clean(expression.value, trim=False))
            case IntegerLiteral() | FloatLiteral():
                return constant(self.number(expression.token))
            case TrueLiteral() | FalseLiteral():
                return constant(bool(expression.value))
            case Nil() | Empty() | Blank():
                return constant(Missing("nil"))
        self.fail("here a variable, a number or a text in quotes can stand", expression.token.start_index)

    def number(self, token: Token) -> Decimal:
        if sum(character.isdigit() for character in token.value) > MAX_LITERAL_DIGITS:
            self.fail(f"a number has at most {MAX_LITERAL_DIGITS} digits", token.start_index)
        return Decimal(token.value)

    def path(self, path: Path) -> Value:
        index = path.token.start_index
        match path.path:
            case ["client", str(name)]:
                if name not in self.known:
                    self.fail(f"nobody has client.{name}{suggest(name, self.known, 'client')}", index)
                self.read.add(name)
                return Value(read_client(name), (f"client.{name}",))
            case ["vars", str(name)]:
                if name not in self.given:
                    self.fail(f"no value was given for vars.{name}{suggest(name, self.given, 'vars')}", index)
                return self.given_value(name, index)
            case [str(name)] if name in self.locals:
                return Value(lambda rendering: rendering.locals.get(name, Missing(name)), self.locals[name])
            case ["client" | "vars" as root]:
                self.fail(f"{root!r} alone is no value: write {root}.name, with a name after the dot", index)
            case [str(name)] if name in self.known:
                self.fail(f"nothing is called {name!r}: did you mean client.{name}?", index)
            case [str(name)] if name in self.given:
                self.fail(f"nothing is called {name!r}: did you mean vars.{name}?", index)
            case [str(name)]:
                self.fail(f"nothing is called {name!r}: variables begin with client. or vars.", index)
        self.fail('a variable has one name: write client.name, or client["first name"]', index)

    def given_value(self, name: str, index: int) -> Value:
        try:
            value = values.read(f"vars.{name}", self.given[name])
        except (ValueError, TooLong) as error:
            self.fail(f"vars.{name}: {error}", index)
        return Value(lambda _: value, (), is_constant=True)

    # filters

    def filtered(self, expression: Expression) -> Value:
        if not isinstance(expression, FilteredExpression):
            self.fail("here a variable, a number or a text in quotes can stand", expression.token.start_index)
        value = self.value(expression.left)
        for each in expression.filters or ():
            value = self.filter(value, each)
        return value

    def filter(self, left: Value, node: Filter) -> Value:
        index = node.token.start_index
        if (found := values.FILTERS.get(node.name)) is None:
            self.fail(f"there is no filter {node.name!r}; use {', '.join(sorted(values.FILTERS))}", index)
        function, kinds, required = found
        if not required <= len(node.args) <= len(kinds):
            wanted = str(required) if required == len(kinds) else f"{required} to {len(kinds)}"
            self.fail(f"the filter {node.name!r} needs {wanted} values after the colon", index)
        arguments = [self.argument(node.name, kind, each) for kind, each in zip(kinds, node.args, strict=False)]
        passes_missing = node.name == "default"

        def evaluate(rendering: Rendering) -> object:
            value = left.evaluate(rendering)
            if isinstance(value, Missing) and not passes_missing:
                return value
            return function(value, rendering, *[argument.evaluate(rendering) for argument in arguments])

        names = tuple(dict.fromkeys((*left.names, *(name for argument in arguments for name in argument.names))))
        result = Value(evaluate, names, left.is_constant and all(argument.is_constant for argument in arguments))
        result = result._replace(evaluate=self.guard(evaluate, result, node.token))
        if result.is_constant:
            self.try_out(result.evaluate, node.token)
        return result

    def argument(self, name: str, kind: str, argument: object) -> Value:
        if not isinstance(argument, PositionalArgument):
            token: Token = argument.token  # type: ignore[attr-defined]
            self.fail(f"the filter {name!r} has no value with a name", token.start_index)
        expression, index = argument.value, argument.value.token.start_index
        if kind == "count":
            most = values.MAX_PLACES if name == "round" else MAX_BODY
            if not isinstance(expression, IntegerLiteral) or not 0 <= self.number(expression.token) <= most:
                self.fail(f"the filter {name!r} needs a whole number from 0 to {most:,} here", index)
            return constant(int(expression.value))
        if kind == "format":
            if not isinstance(expression, StringLiteral):
                self.fail("the filter 'date' needs a format in quotes, such as \"%d.%m.%Y\"", index)
            try:
                return constant(values.split_format(expression.value))
            except ValueError as error:
                self.fail(str(error), index)
        return self.value(expression)

    # errors

    def guard(self, evaluate: Evaluate, value: Value, token: Token) -> Evaluate:
        """Turn what a value makes impossible into EmptyVariable; without a variable in it, into TemplateError."""

        def run(rendering: Rendering) -> object:
            try:
                return evaluate(rendering)
            except TemplateError:
                raise
            except (ValueError, ArithmeticError) as error:
                detail = str(error) if isinstance(error, ValueError) else "the number cannot be computed"
                if value.names:
                    raise EmptyVariable(value.names[0], f"{', '.join(value.names)}: {detail}") from error
                self.fail(detail, token.start_index)

        return run

    def try_out(self, evaluate: Evaluate, token: Token) -> None:
        """Evaluate what is the same for everybody, so that its errors are found before anything is written."""
        try:
            evaluate(Rendering({}, UTC))
        except EmptyVariable as error:
            self.fail(str(error), token.start_index)
        except TooLong as error:
            self.fail(f"this makes a text of {error.length:,} characters", token.start_index)


def constant(value: object) -> Value:
    return Value(lambda _: value, (), is_constant=True)


def always(_: Rendering) -> bool:
    return True


def choose(choices: Sequence[tuple[Evaluate, Step]], default: Step | None) -> Step:
    """Run the step of the first condition that is true."""

    def run(rendering: Rendering) -> None:
        for condition, step in choices:
            if condition(rendering):
                return step(rendering)
        return default(rendering) if default else None

    return run


def suggest(name: str, known: Collection[str], root: str) -> str:
    """Name a similar variable; without one, those that exist."""
    spellings = {each.lower(): each for each in sorted(known)}
    if near := difflib.get_close_matches(name.lower(), list(spellings), n=1):
        return f": did you mean {show_name(root, spellings[near[0]])}?"
    names = [show_name(root, each) for each in sorted(known)]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"; there are {', '.join(names[:12])}{more}" if names else ""


def show_name(root: str, name: str) -> str:
    """Write a variable as Liquid needs it."""
    return f"{root}.{name}" if re.fullmatch(r"\w[\w-]*", name) else f'{root}["{name}"]'


def read_client(name: str) -> Evaluate:
    def evaluate(rendering: Rendering) -> object:
        try:
            return values.read(f"client.{name}", rendering.client.get(name))
        except ValueError as error:
            raise EmptyVariable(f"client.{name}", f"client.{name}: {error}") from error

    return evaluate
