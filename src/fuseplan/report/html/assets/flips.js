// Where a choice turns from one size to the next: the plan, and the better of several orders.

const lettersOf = (policies, between = ", ") => policies.map((policy) => policy.letter).join(between);

const namedPolicy = (policy) => `${policy.letter} ${shortPolicy(policy)}`;

/** Sizes at which a value is another one than at the size before, by index. */
function turnsOf(values) {
    return values.flatMap((value, index) => (index && value !== values[index - 1] ? [index] : []));
}

/** Where the plan for one size alone is another one than for the size before. */
function planFlips() {
    const [first] = LINED;
    return first.name === "planned" ? turnsOf(POINTS.map((point) => point.at[first.index].outcome)) : [];
}

/** Orders of the same rules, of which one can be better here and another there. */
const orderSets = remembered(() => {
    const sets = new Map();
    for (const policy of LINED.filter((each) => each.order.length)) {
        const key = [...policy.order].sort().join(" ");
        sets.set(key, [...(sets.get(key) || []), policy]);
    }
    return [...sets.values()].filter((set) => set.length > 1);
});

/** The orders of a set that save the most at a size, by index. */
function bestOf(set, point) {
    const most = Math.max(...set.map((policy) => point.at[policy.index].saved));
    const best = set.filter((policy) => point.at[policy.index].saved === most);
    return best.map((policy) => policy.index).join(" ");
}

const orderFlips = (set) => turnsOf(POINTS.map((point) => bestOf(set, point)));

const orderTitle = (set) => `${set.length === 2 ? "better" : "best"} of ${lettersOf(set)}`;

/** All of it in words. */
function flipText() {
    const turns = orderSets().map((set) => [`the ${orderTitle(set)}`, orderFlips(set)]);
    if (LINED[0].name === "planned") turns.unshift(["the best plan", planFlips()]);
    const between = (index) => `between ${number(POINTS[index - 1].tokens)} and ${number(POINTS[index].tokens)}`;
    const text = ([what, at]) =>
        at.length ? `${what} flips ${at.map(between).join(", and ")} tokens` : `${what} is the same at every size`;
    return turns.map(text).join("; ");
}
