"""What the optimizer does to each parameter, as an expression that can be compared between parameters.

Nothing is known about particular optimizers: the captured update shows whether it treats every element of a parameter
alike, or mixes them and needs the whole parameter.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from zgraph import ops
from zgraph.errors import OptimizerError, quoted
from zgraph.program import OF_PARAMETERS, Input, Phase, Program, Role, operand, phase_of, target_name
from zgraph.terms import promoted


class Updates:
    """The optimizer update of every parameter, as a hash-consed expression.

    Attributes:
        gradient: what it reads of backward.
        nodes: its own calls, in order.
        results: PARAM, OPT_STATE and GRADIENT inputs -> their new values.
        work: of an update that mixes elements: about how many operations it takes. Absent for elementwise ones.
        group: equal for parameters that may share a bucket: their updates are the same operators on the same
            hyperparameters, each reading its own parameter, gradient and state. Of updates that mix elements, only
            what the bucket has in common must be the same: which state there is, and what is computed of numbers.
        apart: of an update that mixes elements, calls on gradients that treat every element alike, and calls on
            numbers that the bucket has in common.
    """

    def __init__(self, program: Program) -> None:
        self.gradient: dict[str, fx.Node] = {}
        self.group: dict[str, Hashable] = {}
        self.work: dict[str, int] = {}
        self.apart: dict[str, set[fx.Node]] = {}
        self.nodes: dict[str, list[fx.Node]] = {}
        self.shared: list[fx.Node] = []  # arithmetic on hyperparameters alone
        self.sums = list(program.graph.find_nodes(op="call_function", target=ops.add_up))
        self.of_all = _of_all(program)
        self.squared = {
            square.meta["origin"].module: operand(square) for total in self.sums for square in total.all_input_nodes
        }  # what of each parameter the squares are added up of
        self.results: dict[str, dict[Input, Any]] = {}
        self._program = program
        self._terms: dict[Hashable, int] = {}
        self._term: dict[fx.Node, int] = {}
        self._owner: dict[fx.Node, str | None] = {}
        self._vector: set[fx.Node] = set()
        self._is_vector: dict[tuple[bool, str], bool] = {}  # by kind of update and key, as others than 0-dim ones show
        for what, result in zip(program.outputs, program.results(), strict=True):
            if what is not None and what.role in OF_PARAMETERS:
                self.results.setdefault(what.name, {})[what] = result
        inputs = {what: node for node, what in program.placeholders()}
        position = {node: i for i, node in enumerate(program.graph.nodes)}
        self._shapes = {name: inputs[Input(Role.PARAM, name)].meta["val"].shape for name in self.results}
        for name, shape in self._shapes.items():
            self._choose(name, shape)
        for results in self.results.values():
            for what, result in results.items():
                if what.role is Role.OPT_STATE and self._shapes[what.name]:
                    self._is_vector[what.name in self.work, what.key] = _num_dims(result) > 0
        for name, results in self.results.items():
            self.nodes[name] = []
            shape = self._shapes[name]
            keys: list[Hashable] = []
            for what, result in sorted(results.items(), key=lambda item: str(item[0])):
                term = self._visit(result, name, shape)
                is_number = isinstance(result, fx.Node) and not isinstance(result.meta["val"], torch.Tensor)
                if name in self.work and is_number and result in self._vector:
                    raise OptimizerError(
                        f"{what.key} in the state of {name} is a number that is computed from its elements",
                        where=quoted(result.meta["origin"].source),
                        fix="keep it as a 0-dim tensor, without item()",
                    )
                if name in self.work and what.role is not Role.GRADIENT and self.is_vector(what):
                    term = ("tensor", result.meta["val"].dtype)
                keys.append((what.role, what.key, term, program.init.get(what)))
            if name in self.squared:
                keys.append((None, "", self._visit(self.squared[name], name, shape), None))
            self.nodes[name].sort(key=position.__getitem__)
            if name in self.work:
                self.apart[name] = self._apart(name)
            if name not in self.gradient:
                raise OptimizerError(
                    f"the update of {name} does not read its gradient", fix="this optimizer needs no backward pass"
                )
            self.group[name] = (name in self.work, *keys)

    def _choose(self, name: str, shape: torch.Size) -> None:
        """See whether the update mixes elements, and what it costs if it does."""
        own = self._before([*self.results[name].values(), self.squared.get(name)])
        mixing = [node for node in own if _mixes(node, shape)]
        if not mixing:
            return
        for node in own:
            if ops.is_random(node.target):
                raise OptimizerError(
                    f"the update of {name} draws random numbers in {target_name(node.target)}, which each rank would "
                    "draw others of",
                    where=quoted(node.meta["origin"].source),
                    fix="draw them outside of step(); noise in gradients is the option gradient_noise",
                )
        self.work[name] = sum(map(_num_operations, own))

    def _before(self, roots: Iterable[Any], *, within: set[fx.Node] | None = None) -> list[fx.Node]:
        """Calls of the update that values are computed with, but for what all parameters have in common."""
        found: dict[fx.Node, None] = {}
        stack = [root for root in roots if isinstance(root, fx.Node)]
        while stack:
            node = stack.pop()
            is_update = node.op == "call_function" and phase_of(node) is Phase.UPDATE and node not in self.of_all
            if is_update and node not in found and (within is None or node in within):
                found[node] = None
                stack.extend(node.all_input_nodes)
        return list(found)

    def _apart(self, name: str) -> set[fx.Node]:
        results = self.results[name]
        roots = [value for what, value in results.items() if what.role is Role.GRADIENT or not self.is_vector(what)]
        return set(self._before([*roots, self.squared.get(name)], within=set(self.nodes[name])))

    def shapes_of_state(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a parameter's optimizer-state tensors by key, where they are not the parameter's own."""
        results = self.results.get(name, {})
        vals = {w.key: r.meta["val"] for w, r in results.items() if w.role is Role.OPT_STATE and self.is_vector(w)}
        shape = self._shapes.get(name)
        # Of a 0-dim parameter all are told: a number of its own is not one of the bucket's.
        is_told = {key: not shape or val.shape != shape for key, val in vals.items()}
        return {key: tuple(val.shape) for key, val in vals.items() if name in self.work and is_told[key]}

    def term(self, node: fx.Node) -> Hashable:
        """Equal for what is the same operators on the same things; parameters, gradients and state go by their kind.

        None for what no update reads.
        """
        return self._term.get(node)

    def _visit(self, root: Any, name: str, shape: torch.Size) -> Hashable:
        if not isinstance(root, fx.Node):
            return ("literal", root)
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._term:
                stack.pop()
                continue
            if self._leaf(node, name):
                stack.pop()
                continue
            waiting = [n for n in node.all_input_nodes if n not in self._term]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            self._add(node, name, shape)
        if self._owner[root] not in (None, name):
            raise self._coupled(root, name)
        return self._term[root]

    def _leaf(self, node: fx.Node, name: str) -> bool:
        """Give a leaf its term; leaves of a parameter's own are named by what they are, not whose."""
        if node.op == "placeholder":
            what: Input = node.meta["input"]
            if what.role is Role.PARAM:
                key: Hashable = ("param",)
                self._vector.add(node)
            elif what.role is Role.OPT_STATE:
                key = ("state", what.key)
                if isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].dim() > 0:
                    self._vector.add(node)
            elif what.role is Role.GRADIENT:
                key = ("earlier gradients",)
                self._vector.add(node)
            elif what.role is Role.CONSTANT:
                value = self._program.constants[what.name]
                key = ("constant", str(value.dtype), tuple(value.shape), tuple(value.flatten().tolist()))
            else:
                key = ("input", what)
            owned = what.role in OF_PARAMETERS
            self._set(node, key, what.name if owned else None)
            return True
        if node in self.of_all:
            self._set(node, ("shared", node), None)
            return True
        if node.meta["origin"].phase is not Phase.UPDATE:
            self._vector.add(node)
            self._term[node] = self._terms.setdefault(("gradient",), len(self._terms))
            self._owner[node] = None  # a gradient may be shared: two biases that are added have the same one
            return True
        return False

    def _add(self, node: fx.Node, name: str, shape: torch.Size) -> None:
        if not shape and name not in self.work:
            self._check_promotion(node, name)
        owners = {self._owner[n] for n in node.all_input_nodes} - {None}
        gradients = [n for n in node.all_input_nodes if self._is_gradient(n)]
        if owners - {name} or any(self.gradient.setdefault(name, g) is not g for g in gradients):
            raise self._coupled(node, name)

        def is_shape(arg: Any) -> bool:
            return bool(shape) and ops.creates(node.target) and isinstance(arg, (list, tuple)) and tuple(arg) == shape

        def term(arg: Any) -> Hashable:
            if isinstance(arg, fx.Node):
                return self._term[arg]
            if is_shape(arg):
                return "shape"
            if isinstance(arg, (list, tuple)):
                return tuple(term(a) for a in arg)
            return (type(arg).__name__, arg)

        key = (node.target, tuple(map(term, node.args)), tuple((k, term(v)) for k, v in sorted(node.kwargs.items())))
        is_tensor = name in self.work and _num_dims(node) > 0  # made of nothing but its shape, such as an identity
        is_own = bool(owners or gradients) or any(map(is_shape, node.args)) or is_tensor
        self._set(node, key, name if is_own else None)
        if any(n in self._vector for n in node.all_input_nodes):
            self._vector.add(node)
        (self.nodes[name] if is_own else self.shared).append(node)

    def _check_promotion(self, node: fx.Node, name: str) -> None:
        """Refuse what a 0-dim parameter computes in another dtype than a vector would, as which it is stored."""
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
        as_number, as_vector = (
            promoted((n.meta["val"].dtype, is_vector and n in self._vector) for n in inputs)
            for is_vector in (False, True)
        )
        if as_number is not as_vector:
            raise OptimizerError(
                f"the update of {name}, a single number, computes {target_name(node.target)} in {as_number}, where a "
                f"vector would in {as_vector}, and parameters are stored in vectors",
                where=quoted(node.meta["origin"].source),
                fix="give the parameter the shape [1], or leave it to another optimizer",
            )

    def _is_gradient(self, node: fx.Node) -> bool:
        return node.op != "placeholder" and node.meta["origin"].phase is not Phase.UPDATE

    def _set(self, node: fx.Node, key: Hashable, owner: str | None) -> None:
        self._term[node] = self._terms.setdefault(key, len(self._terms))
        self._owner[node] = owner

    def is_vector(self, what: Input) -> bool:
        """Whether a state entry is each parameter's own tensor, rather than one number for all parameters of a bucket.

        Its shape tells, except for the state of a 0-dim parameter: there the other parameters' tells, and if there
        are none, it is what the gradient flows into. Where the update mixes elements, a number that it flows into is
        the parameter's own, too.
        """
        if what.role is not Role.OPT_STATE:
            return True
        result, is_mixed = self.results[what.name][what], what.name in self.work
        if is_mixed and result in self._vector:
            return True
        if self._shapes[what.name]:
            return _num_dims(result) > 0
        return self._is_vector.get((is_mixed, what.key), isinstance(result, fx.Node) and result in self._vector)

    def given(self, name: str) -> Hashable:
        """The optimizer state given at capture, but for the values of numbers that are the parameter's own."""
        given: Any = self._program.given.get(name)
        whats = {what.key: what for what in self.results.get(name, {}) if what.role is Role.OPT_STATE}
        own = {key for key, what in whats.items() if self.is_vector(what)}
        return given and tuple((key, dtype, None if key in own else value) for key, dtype, value in given)

    def _coupled(self, node: fx.Node, name: str) -> OptimizerError:
        origin = node.meta.get("origin")
        return OptimizerError(
            f"the update of {name} reads another parameter's value, gradient or state",
            where=quoted(origin.source) if origin else None,
            fix="use an optimizer that updates each parameter from its own gradient and state",
        )


def _mixes(node: fx.Node, shape: torch.Size) -> bool:
    """Whether a call is more than the same for each element of tensors of ``shape``."""
    vals = [n.meta["val"] for n in (node, *node.all_input_nodes)]
    shapes = {val.shape for val in vals if isinstance(val, torch.Tensor)}
    return not ops.is_elementwise(node.target) or bool(shapes - {shape, torch.Size(())})


def _num_operations(node: fx.Node) -> int:
    """About how many operations a call takes: those that torch counts, or one for each element read and written.

    Decompositions of an n x n matrix, which torch does not count, take about n^3.
    """
    tensors = [n.meta["val"] for n in (node, *node.all_input_nodes) if isinstance(n.meta["val"], torch.Tensor)]
    packet = getattr(node.target, "overloadpacket", None)
    if packet in flop_registry:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        return int(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"]))
    each = min(tensors[-1].shape, default=1) if "linalg" in target_name(node.target) else 1
    return sum(tensor.numel() for tensor in tensors) * each


def _num_dims(node: Any) -> int:
    val = node.meta["val"] if isinstance(node, fx.Node) else node
    return val.dim() if isinstance(val, torch.Tensor) else 0


def _of_all(program: Program) -> dict[fx.Node, bool]:
    """What all parameters' updates read alike: sums over all gradients, state of the step, and what follows from them.

    In order, with whether it is known only when backward is done. None of it is any parameter's own.
    """
    found: dict[fx.Node, bool] = {}
    fixed: set[fx.Node] = set()  # made of hyperparameters alone
    for node in program.graph.nodes:
        if node.op == "call_function" and node.meta["origin"].phase is Phase.UPDATE:
            sources = node.all_input_nodes
            roles = {source.meta["input"].role for source in sources if source.op == "placeholder"}
            others = [s for s in sources if s.op != "placeholder" and s not in found and s not in fixed]
            is_fixed = not others and roles <= {Role.HYPER, Role.CONSTANT}
            follows = is_fixed and not found.keys().isdisjoint(sources)
            if node.target is ops.add_up or Role.RECIPE in roles or follows:
                early = all(phase_of(source) is Phase.FORWARD for source in others)
                found[node] = not early or any(found.get(source, False) for source in sources)
            elif is_fixed:
                fixed.add(node)
    return found
