// One box that finds modules, ops, rules, nodes, near misses and cost rows; what it means is marked in the drawing.

const SHOWN = 14;
let results = [];
let current = -1;

function openSearch() {
    const input = byId("search");
    input.addEventListener("input", () => find(input.value));
    input.addEventListener("keydown", searchKey);
    input.addEventListener("focus", () => find(input.value));
    input.addEventListener("blur", () => fold());
    document.addEventListener("keydown", (event) => {
        const writing = event.target.closest?.("input, select, textarea");
        if (event.key === "/" && !writing && !event.ctrlKey && !event.metaKey && !event.altKey) {
            event.preventDefault();
            input.focus();
            input.select();
        }
    });
}

/** Everything that can be found: what it is, its name, what else it is known by, and what choosing it does. */
const entries = remembered(() => [
    ...RULES.map((rule) => ({ kind: "rule", name: rule, text: rule, open: () => showRule(rule) })),
    ...POLICIES.map((policy) => ({
        kind: "policy",
        name: policyTitle(policy),
        text: policy.name,
        open: () => change({ policy: policy.index }),
    })),
    ...GRAPHS.flatMap((graph) =>
        graph.boxes.map((box) => ({
            kind: box.op ? "op" : "ops",
            name: box.op || box.title,
            more: box.source || graph.name,
            text: textOfBox(box),
            node: box.members,
            open: () => showInGraph(graph.index, box.index),
        })),
    ),
    ...VIEW.misses.map((miss, index) => ({
        kind: "near miss",
        name: miss.detail,
        more: miss.rule,
        text: [miss.rule, miss.detail, miss.where, miss.reason, miss.nearness, miss.code].join(" "),
        open: () => change({ selection: { kind: "miss", miss: index } }),
    })),
    ...[...new Set(COSTS.map((row) => row.site))].map((site) => ({
        kind: "cost rows",
        name: site,
        text: site,
        open: () => showCosts({ cls: site }),
    })),
]);

/** A rule is shown by its first fusion under the policy at hand. */
function showRule(rule) {
    const found = FUSIONS.filter((fusion) => fusion.rule === rule);
    const applied = found.find((fusion) => fateOf(fusion, STATE.policy, STATE.range).state === "applied");
    if (applied || found.length) showFusion(applied || found[0]);
}

function find(text) {
    const query = text.trim().toLowerCase();
    change({ query });
    const found = query ? entries().filter((entry) => entry.text.toLowerCase().includes(query)) : [];
    const exact = (entry) => (entry.name.toLowerCase().startsWith(query) ? 0 : entry.node?.includes(query) ? 1 : 2);
    found.sort((a, b) => exact(a) - exact(b));
    results = found.slice(0, SHOWN);
    current = results.length ? 0 : -1;
    drawResults(query, found.length);
}

function drawResults(query, count) {
    const list = byId("search-results");
    const input = byId("search");
    list.hidden = !query;
    input.setAttribute("aria-expanded", String(Boolean(query)));
    refill(
        list,
        results.map((entry, index) =>
            el(
                "li",
                {
                    id: `result-${index}`,
                    role: "option",
                    "aria-selected": String(index === current),
                    onpointerdown: (event) => {
                        event.preventDefault();
                        take(index);
                    },
                },
                el("span.kind", entry.kind),
                code(entry.name),
                entry.more ? el("small", nodeFor(entry, query) || entry.more) : null,
            ),
        ),
        el(
            "li.count",
            { role: "presentation" },
            count
                ? `${plural(count, "result")}${count > SHOWN ? `, the first ${SHOWN} shown` : ""}`
                : "nothing of that name",
        ),
    );
    input.setAttribute("aria-activedescendant", current >= 0 && query ? `result-${current}` : "");
}

/** The node that was asked for, if the name of the entry doesn't say it. */
const nodeFor = (entry, query) =>
    entry.name.toLowerCase().includes(query) ? null : entry.node?.find((node) => node.toLowerCase().includes(query));

function searchKey(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1 };
    if (event.key in steps && results.length) {
        event.preventDefault();
        current = (current + steps[event.key] + results.length) % results.length;
        byId("search-results")
            .querySelectorAll('[role="option"]')
            .forEach((item, index) => {
                item.setAttribute("aria-selected", String(index === current));
                if (index === current) item.scrollIntoView({ block: "nearest" });
            });
        byId("search").setAttribute("aria-activedescendant", `result-${current}`);
    } else if (event.key === "Enter" && current >= 0) {
        event.preventDefault();
        take(current);
    } else if (event.key === "Escape") {
        byId("search").value = "";
        find("");
        byId("search").blur();
    }
}

function take(index) {
    byId("search").value = "";
    change({ query: "" });
    fold();
    opener = byId("search");
    const item = results[index].open();
    if (item instanceof Element) focusItem(byId("layers"), item);
}

function fold() {
    byId("search-results").hidden = true;
    byId("search").setAttribute("aria-expanded", "false");
}
