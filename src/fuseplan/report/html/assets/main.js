// Opens every part of the page, in the order in which it is read.

function openNav() {
    const counts = { misses: VIEW.misses.length, costs: COSTS.length, constants: VIEW.constants.length };
    const names = {
        tokens: "Tokens",
        policies: "Policies",
        graph: "Graph",
        conflicts: "Conflicts",
        misses: "Near misses",
        costs: "Cost rows",
        constants: "Constants",
        run: "Run",
    };
    const there = Object.entries(names).filter(([id]) => !byId(id).hidden);
    refill(
        byId("nav"),
        there.map(([id, name]) =>
            el("a", { href: `#${id}` }, name, counts[id] ? el("span", number(counts[id])) : null),
        ),
    );
}

function legend() {
    const matched = VIEW.rules.filter((rule) => rule.matched).map((rule) => ruleName(rule.name));
    return [
        matched,
        el("span", el("i.key-region", { "aria-hidden": "true" }), "fused region"),
        el("span", el("i.key-bracket", { "aria-hidden": "true" }), "candidate that lost; ✕ where its op was taken"),
        VIEW.misses.length ? el("span", nearGlyph(false), " near miss") : null,
        VIEW.misses.some(isFaint) ? el("span", nearGlyph(true), " one provider declines, or no match at all") : null,
        el(
            "span.keys",
            el("kbd", "Tab"),
            " into the graph, ",
            el("kbd", "←↑↓→"),
            " move, ",
            el("kbd", "Enter"),
            " details, ",
            el("kbd", "Esc"),
            " close",
        ),
    ];
}

function openPage() {
    openState();
    for (const element of document.querySelectorAll("main .scroll")) reachable(element);
    openTheme();
    if (POLICIES.length) {
        openSummary();
        openVerdicts();
        openTokens();
        openPolicies();
        openChanges();
        openLayers();
        openConflicts();
    }
    openMisses();
    openCosts();
    openRun();
    openDetails();
    openSearch();
    openNav();
    document.documentElement.dataset.ready = "true";
    performance.mark("fuseplan-ready");
}

openPage();
