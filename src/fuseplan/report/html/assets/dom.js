// Elements. Texts become text nodes: nothing that a model is called can become markup.

const SVG = "http://www.w3.org/2000/svg";

/** `el("div.name.other", {title: "..."}, child, "text", ...)`. */
function el(kind, attributes, ...children) {
    const [tag, ...classes] = kind.split(".");
    return furnish(document.createElement(tag), classes, attributes, children);
}

/** The same for SVG. */
function svg(kind, attributes, ...children) {
    const [tag, ...classes] = kind.split(".");
    return furnish(document.createElementNS(SVG, tag), classes, attributes, children);
}

/** Sets attributes: functions listen, `style` sets properties, false and null are left out. */
function furnish(element, classes, attributes, children) {
    if (classes.length) element.setAttribute("class", classes.join(" "));
    for (const [name, value] of Object.entries(attributes || {})) {
        if (typeof value === "function") element.addEventListener(name.slice(2), value);
        else if (name === "style")
            for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
        else if (value !== null && value !== undefined && value !== false)
            element.setAttribute(name, value === true ? "" : value);
    }
    element.append(
        ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
    );
    return element;
}

const byId = (id) => document.getElementById(id);

/** Puts children in the place of those that are there. */
function refill(element, ...children) {
    element.replaceChildren(
        ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
    );
}

/** A name that may break after its signs. */
function breakable(name) {
    return name.split(/(?<=[_.,(])/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));
}

const code = (name, attributes) => el("span.code", attributes, breakable(name));

/** The colour of a rule, with its name beside it wherever it is used. */
const swatch = (rule) => el("span.swatch", { "data-rule": ruleHue(rule), "aria-hidden": "true" });

const ruleName = (rule) => el("span.rule", null, swatch(rule), code(rule));

/** A table of `columns`: [title, class], and rows of cells; a cell is a node, a text, or [node, class]. */
function table(kind, columns, rows) {
    const head = columns.map(([title, name]) => el(name ? `th.${name}` : "th", { scope: "col" }, title));
    return el(`table.${kind}`, null, el("thead", null, el("tr", null, head)), el("tbody", null, rows));
}

/** What may be wider than the page: it scrolls by itself, and keys reach it while it has to. */
function reachable(element) {
    new ResizeObserver(() => (element.tabIndex = element.scrollWidth > element.clientWidth ? 0 : -1)).observe(element);
    return element;
}

/** Says something to who can't see what changed. */
function announce(text) {
    byId("live").textContent = text;
}
