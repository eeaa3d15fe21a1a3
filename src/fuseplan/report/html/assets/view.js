// The data of the page, with its tables resolved.

const TERMS = ["launch", "signal", "staging", "memory", "wire"];

const VIEW = JSON.parse(byId("view").textContent);
const RULES = VIEW.rules.map((rule) => rule.name);
const HUES = 8;

const textAt = (index) => (index < 0 ? null : VIEW.strings[index]);
const ruleHue = (rule) => (RULES.includes(rule) ? RULES.indexOf(rule) % HUES : HUES - 1);

const GRAPHS = VIEW.graphs.map((graph, index) => readGraph(graph, index));
const FUSIONS = VIEW.fusions.map((row, id) => readFusion(row, id));
const COSTS = VIEW.costs.map((row) => readCost(row));
const POLICIES = VIEW.policies.map((policy, index) => ({ ...policy, index, letter: letterOf(policy, index) }));
const POINTS = VIEW.sizes.points
    .filter(([, unfused]) => unfused)
    .map(([tokens, unfused, at, step]) => ({
        tokens,
        unfused,
        step,
        at: at.map(([saved, outcome]) => ({ saved, outcome })),
    }));

function readGraph(graph, index) {
    const boxes = graph.boxes.map(([op, title, subtitle, calls, members, inputs, source, line, value], place) => ({
        graph: index,
        index: place,
        op: textAt(op),
        title: textAt(title),
        subtitle: textAt(subtitle),
        inputs,
        users: [],
        calls: calls.flatMap((name, at) => (at % 2 ? [] : [[textAt(name), calls[at + 1]]])),
        members: members.map(textAt),
        source: textAt(source),
        line: textAt(line),
        value: textAt(value),
        marks: [],
        segment: null,
    }));
    for (const box of boxes) for (const input of box.inputs) boxes[input].users.push(box.index);
    const segments = graph.segments.map((segment, place) => ({ ...segment, graph: index, index: place }));
    for (const segment of segments) for (const box of segment.boxes) boxes[box].segment = segment.index;
    VIEW.misses.forEach((miss, at) => {
        for (const mark of miss.marks) if (mark.graph === index && mark.box !== null) boxes[mark.box].marks.push(at);
    });
    return { name: graph.name, index, boxes, segments };
}

function readFusion(row, id) {
    const [graph, rule, op, provider, anchor, contested, site, source, cls, before, after, boxes, nodes, how] = row;
    return {
        id,
        graph,
        rule: textAt(rule),
        op: textAt(op),
        provider: textAt(provider),
        anchor: textAt(anchor),
        contested: textAt(contested),
        site: textAt(site),
        source: textAt(source),
        cls: textAt(cls),
        before: textAt(before),
        after: textAt(after),
        boxes,
        nodes: nodes.map(textAt),
        provenance: textAt(how),
    };
}

function readCost([site, places, alternative, tokens, ns, spread, provenance, kernels, origin]) {
    const runs = kernels.flatMap((kernel, at) =>
        at % 2 ? [] : [{ kernel: VIEW.kernels[kernel], count: kernels[at + 1] }],
    );
    const terms = TERMS.map((_, at) => runs.reduce((sum, run) => sum + run.count * run.kernel[at + 1], 0));
    return {
        site: textAt(site),
        places,
        alternative: textAt(alternative),
        tokens,
        ns,
        spread,
        provenance: textAt(provenance),
        runs,
        terms,
        origin,
    };
}

/** A, B, C ...; the plan without force and forbid is marked by a stroke. */
function letterOf(policy, index) {
    if (!policy.counterfactual) return String.fromCharCode(65 + index);
    const bound = VIEW.policies.findIndex((each) => each.name === policy.name);
    return `${String.fromCharCode(65 + bound)}′`;
}

const policyTitle = (policy) => (policy.counterfactual ? `${policy.name}, nothing forced or forbidden` : policy.name);
const shortPolicy = (policy) => (policy.order.length ? `${policy.order[0]} first` : policy.name);

/** A policy's result for a graph in a range: the applied fusions, and the losers. */
const choiceOf = remembered((policy, range, graph) => {
    const found = POLICIES[policy]?.ranges[range]?.graphs.find((each) => each.graph === graph);
    return {
        applied: (found?.applied || []).map(([id, saving]) => ({ fusion: FUSIONS[id], saving })),
        lost: (found?.lost || []).map(([id, saving, lost, flips, forbidden, winners]) => ({
            fusion: FUSIONS[id],
            saving,
            lost,
            flips,
            forbidden: Boolean(forbidden),
            winners: winners.map((each) => FUSIONS[each]),
        })),
    };
});

/** Of what has lost at each place, one for each rule: its best provider. Other providers of what won are left out. */
const losersOf = remembered((policy, range, graph) => {
    const { applied, lost } = choiceOf(policy, range, graph);
    const taken = new Set(applied.map(({ fusion }) => `${fusion.rule} ${fusion.anchor}`));
    const best = new Map();
    for (const loss of lost) {
        const { rule, anchor, site } = loss.fusion;
        const key = `${site} ${rule}`;
        if (!taken.has(`${rule} ${anchor}`) && (!best.has(key) || margin(loss) < margin(best.get(key))))
            best.set(key, loss);
    }
    return [...best.values()];
});

const margin = (loss) => (loss.forbidden || loss.lost === null ? Infinity : loss.lost);

/** A function that computes once for each list of arguments. */
function remembered(compute) {
    const known = new Map();
    return (...key) => {
        const name = key.join(" ");
        if (!known.has(name)) known.set(name, compute(...key));
        return known.get(name);
    };
}

/** The same for a function of one object. */
function rememberedBy(compute) {
    const known = new Map();
    return (object) => {
        if (!known.has(object)) known.set(object, compute(object));
        return known.get(object);
    };
}

/** How a fusion fares under a policy in a range: {state: "applied" | "lost" | "none", ...}. */
function fateOf(fusion, policy, range) {
    const choice = choiceOf(policy, range, fusion.graph);
    const applied = choice.applied.find((each) => each.fusion === fusion);
    if (applied) return { state: "applied", ...applied };
    const lost = choice.lost.find((each) => each.fusion === fusion);
    return lost ? { state: "lost", ...lost } : { state: "none", fusion };
}

/** Rows that a class of places is priced by, alone or together with others. */
const costsOf = remembered((cls) => COSTS.filter((row) => row.site === cls || row.site.split(" & ").includes(cls)));
