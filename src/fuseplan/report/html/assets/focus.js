// Moving through a drawing by keys: one stop of the Tab key, and arrows from item to item.

function openFocus(root) {
    root.addEventListener("keydown", (event) => {
        const item = event.target.closest(".item");
        const next = item && !event.altKey && !event.ctrlKey && !event.metaKey ? nextItem(root, item, event.key) : null;
        if (next) {
            event.preventDefault();
            focusItem(root, next);
        }
    });
    root.addEventListener("focusin", (event) => {
        const item = event.target.closest(".item");
        if (item) setStop(root, item);
    });
}

/** Makes one item the place where the Tab key enters. */
function setStop(root, item) {
    for (const other of root.querySelectorAll('.item[tabindex="0"]')) other.tabIndex = -1;
    item.tabIndex = 0;
}

function focusItem(root, item) {
    setStop(root, item);
    item.focus();
    item.scrollIntoView({ block: "nearest", inline: "nearest" });
}

/** After a drawing was made again: the item that had the focus gets it back. */
function restoreFocus(key) {
    const root = byId("layers");
    const items = [...root.querySelectorAll(".item")];
    const same = key && items.find((item) => item.dataset.key === key);
    const stop = same || items.find((item) => item.matches(".region-name")) || items[0];
    if (stop) setStop(root, stop);
    if (same) same.focus({ preventScroll: true });
}

function nextItem(root, item, key) {
    const rows = [...root.querySelectorAll(".layer-row")].filter((row) => row.querySelector(".item"));
    const row = item.closest(".layer-row");
    const items = inOrder(row);
    const at = items.indexOf(item);
    if (key === "ArrowRight") return items[at + 1] || null;
    if (key === "ArrowLeft") return items[at - 1] || null;
    if (key === "Home") return items[0];
    if (key === "End") return items.at(-1);
    const other =
        key === "ArrowDown" ? rows[rows.indexOf(row) + 1] : key === "ArrowUp" ? rows[rows.indexOf(row) - 1] : null;
    return other ? nearest(inOrder(other), item) : null;
}

/** The items of a row from left to right, and from top to bottom where several begin at one place. */
function inOrder(row) {
    const placed = [...row.querySelectorAll(".item")].map((item) => ({ item, rect: item.getBoundingClientRect() }));
    placed.sort((a, b) => Math.round(a.rect.left - b.rect.left) || a.rect.top - b.rect.top);
    return placed.map((each) => each.item);
}

function nearest(items, item) {
    const left = item.getBoundingClientRect().left;
    const off = (other) => Math.abs(other.getBoundingClientRect().left - left);
    const same = items.filter((other) => other.classList[1] === item.classList[1]);
    return (same.length ? same : items).reduce((best, other) => (off(other) < off(best) ? other : best));
}
