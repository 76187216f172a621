"""Small changes of a module's source, each of which some test should notice."""

import ast
import dataclasses
from collections.abc import Callable, Iterator

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_SKIPPED = (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Global, ast.Nonlocal)
_LEFT_ALONE = {"annotation", "returns", "decorator_list", "type_params"}


@dataclasses.dataclass
class Change:
    """One change: the function it is in (the outermost; empty at module level), where, what becomes of what, and how to make it."""

    function: str
    first_line: int
    line: int
    before: str
    after: str
    make: Callable[[], None]


def changes_of(tree: ast.Module, has_text: bool = True) -> Iterator[Change]:
    """Every change of a module, in the order of its source; ``make`` of one of them changes this tree."""
    yield from _Walk(has_text).walk(tree)


def mutated(source: str, number: int) -> tuple[ast.Module, Change]:
    """The module with one of its changes."""
    tree = ast.parse(source)
    change = list(changes_of(tree, has_text=False))[number]  # the texts take most of the time
    change.make()
    return ast.fix_missing_locations(tree), change


class _Walk:
    def __init__(self, has_text: bool) -> None:
        self.has_text = has_text
        self.classes: list[str] = []
        self.outer: ast.FunctionDef | None = None
        self.in_message = False

    def walk(self, node: ast.AST) -> Iterator[Change]:
        for name, value in ast.iter_fields(node):
            if name in _LEFT_ALONE or (isinstance(node, ast.ClassDef) and name == "bases"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST) and not isinstance(child, _SKIPPED) and not _is_left_out(node, child):
                    yield from self._of_child(node, name, index, child)

    def _of_child(self, parent: ast.AST, name: str, index: int | None, child: ast.AST) -> Iterator[Change]:
        def put(new: ast.AST) -> Callable[[], None]:
            def make() -> None:
                ast.copy_location(new, child)
                if index is None:
                    setattr(parent, name, new)
                else:
                    getattr(parent, name)[index] = new

            return make

        for new in self._replacements(child):
            yield self._change(child, self._text(child), self._text(new), put(new))
        yield from self._of_operators(child)
        if isinstance(child, ast.Call):
            yield from self._of_keywords(child)
        yield from self._below(child)

    def _below(self, child: ast.AST) -> Iterator[Change]:
        """What lies in a child, with the function, class or message it opens."""
        kept = self.outer, self.in_message
        if isinstance(child, ast.ClassDef):
            self.classes.append(child.name)
            yield from self.walk(child)
            self.classes.pop()
            return
        if isinstance(child, ast.FunctionDef) and self.outer is None:
            yield from self.walk(child.args)  # defaults are made when the module is
            self.outer = child
            for part in child.body:
                if not _is_left_out(child, part) and not isinstance(part, _SKIPPED):
                    yield from self._of_child(child, "body", child.body.index(part), part)
        else:
            self.in_message = self.in_message or isinstance(child, ast.Raise)
            yield from self.walk(child)
        self.outer, self.in_message = kept

    def _text(self, node: ast.AST) -> str:
        return _text(node) if self.has_text else ""

    def _change(self, node: ast.AST, before: str, after: str, make: Callable[[], None]) -> Change:
        name = ".".join([*self.classes, self.outer.name]) if self.outer else ""
        first = min([self.outer.lineno, *(each.lineno for each in self.outer.decorator_list)]) if self.outer else 0
        return Change(name, first, getattr(node, "lineno", 0), before, after, make)

    def _replacements(self, node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Constant) and not (self.in_message and isinstance(node.value, str)):
            if isinstance(node.value, bool):
                yield ast.Constant(not node.value)
            elif isinstance(node.value, (int, float)):
                yield ast.Constant(node.value + 1)
            elif isinstance(node.value, (str, bytes)):
                yield ast.Constant(node.value + ("XX" if isinstance(node.value, str) else b"XX"))
        elif isinstance(node, ast.UnaryOp):
            yield node.operand
        elif isinstance(node, ast.Return) and node.value is not None and _text(node.value) != "None":
            yield ast.Return(ast.Constant(None))
        elif isinstance(node, (ast.AugAssign, ast.Raise, ast.Delete, ast.Continue, ast.Break)) or _is_effect(node):
            yield ast.Pass()
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
            fields = {name: value for name, value in ast.iter_fields(node) if name != "test"}
            yield type(node)(test=ast.UnaryOp(ast.Not(), node.test), **fields)

    def _of_operators(self, node: ast.AST) -> Iterator[Change]:
        where = (
            [(node.ops, i) for i in range(len(node.ops))]
            if isinstance(node, ast.Compare)
            else [(node, None)]
            if hasattr(node, "op")
            else []
        )
        for holder, index in where:
            old = holder.op if index is None else holder[index]
            new = _OPERATORS.get(type(old))
            if new is None:
                continue

            def swap(to: ast.AST, holder: object = holder, index: int | None = index) -> None:
                if index is None:
                    holder.op = to  # type: ignore[attr-defined]
                else:
                    holder[index] = to  # type: ignore[index]

            before = self._text(node)
            swap(new())
            after = self._text(node)
            swap(old)
            yield self._change(node, before, after, lambda swap=swap, new=new: swap(new()))

    def _of_keywords(self, call: ast.Call) -> Iterator[Change]:
        for keyword in call.keywords:
            if keyword.arg not in (None, "strict", "device"):
                yield self._change(
                    keyword, self._text(call), f"without {keyword.arg}=", lambda keyword=keyword: call.keywords.remove(keyword)
                )


def _is_effect(node: ast.AST) -> bool:
    """A statement that is there for what it does: a call, or what is written to an attribute or an item."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    return isinstance(node, ast.Assign) and not any(isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets)


def _is_left_out(parent: ast.AST, node: ast.AST) -> bool:
    """Docstrings, logs, and what no run on a CPU can tell: the strict of zip, a device, and what only a type checker reads."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or _text(node.value).startswith(("_log.", "logging."))
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    if isinstance(node, ast.Assign):
        return _text(node.targets[0]) in ("__all__", "_log")
    return isinstance(node, ast.If) and _text(node.test).endswith("TYPE_CHECKING")


def _text(node: ast.AST) -> str:
    return " ".join(ast.unparse(ast.fix_missing_locations(node) if not hasattr(node, "lineno") else node).split())[:160]
