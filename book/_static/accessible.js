// What the theme leaves out for screen readers and keyboards; found with axe.
document.addEventListener("DOMContentLoaded", () => {
  const each = (selector, change) => document.querySelectorAll(selector).forEach(change);
  each("li.has-children > details > summary", (summary) => {
    const link = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", "Pages under " + (link ? link.textContent.trim() : ""));
  });
  each(".capsae-scroll", (box) => {
    if (box.scrollWidth <= box.clientWidth) return;
    const caption = box.closest("figure")?.querySelector("figcaption");
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", (caption ? caption.textContent : "table").trim().slice(0, 80));
  });
  each('details > summary[aria-label="Toggle hidden content"]', (summary) => summary.removeAttribute("aria-label"));
  each(".search-button-field, .theme-switch-button", (button) => button.removeAttribute("aria-label"));
  document.querySelectorAll(".sidebar-primary-items__start > .sidebar-primary-item").forEach((item, i) => {
    item.setAttribute("role", "region");
    item.setAttribute("aria-label", i ? `Sidebar, part ${i + 1}` : "Book title");
  });
  each(".citation-list, .citation, .citation [role]", (item) => item.removeAttribute("role"));
  each("th", (head) => {
    if (head.textContent.trim()) {
      if (!head.hasAttribute("scope")) head.scope = head.closest("thead") ? "col" : "row";
    } else {
      const cell = document.createElement("td");
      cell.className = head.className;
      head.replaceWith(cell);
    }
  });
});
